"""Datasets of robot episodes: readers, writers, cached latents, and clips for training."""

from .action_kind import infer_action_space
from .clips import LatentClips, MixedClips, action_normalisation, standardised_states
from .episode import (
    CameraLayout,
    Episode,
    EpisodeSource,
    camera_layout,
    check_equal_size,
    check_mixture,
    first_readable,
    format_cameras,
    tile,
)
from .irasim_release import IRASimFolder
from .latent_cache import cache_latents
from .lerobot import LeRobotFolder
from .lerobot_writer import count_written, is_written, write_file, write_metadata
from .pictures import read_picture
from .prepared import PreparedEpisodes, frame_skip_for
from .publish import SOURCE_FILE, publish_lerobot, write_dataset_card, write_lerobot
from .sources import open_dataset
from .tables import TableEpisodes
from .video import count_frames, iterate_video, read_frames, read_video, write_video

__all__ = [
    "SOURCE_FILE",
    "CameraLayout",
    "Episode",
    "EpisodeSource",
    "IRASimFolder",
    "LatentClips",
    "LeRobotFolder",
    "MixedClips",
    "PreparedEpisodes",
    "TableEpisodes",
    "action_normalisation",
    "cache_latents",
    "camera_layout",
    "check_equal_size",
    "check_mixture",
    "count_frames",
    "count_written",
    "first_readable",
    "format_cameras",
    "frame_skip_for",
    "infer_action_space",
    "is_written",
    "iterate_video",
    "open_dataset",
    "publish_lerobot",
    "read_frames",
    "read_picture",
    "read_video",
    "standardised_states",
    "tile",
    "write_dataset_card",
    "write_file",
    "write_lerobot",
    "write_metadata",
    "write_video",
]
