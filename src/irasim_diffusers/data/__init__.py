"""Robot clips: video files, episodes and LeRobotDataset folders."""

from .clips import LatentClips, cache_latents, standardised_states
from .episode import Episode
from .lerobot import LeRobotFolder, is_written, write_file, write_metadata
from .video import iterate_video, read_video, write_video

__all__ = [
    "Episode",
    "LatentClips",
    "LeRobotFolder",
    "cache_latents",
    "is_written",
    "iterate_video",
    "read_video",
    "standardised_states",
    "write_file",
    "write_metadata",
    "write_video",
]
