import re

import numpy as np
import pytest
from tiny_models import tiny_pipeline, tiny_transformer

from irasim_diffusers.data import Episode, LeRobotFolder, PreparedEpisodes, write_file, write_metadata
from irasim_diffusers.training import is_pipeline, load_autoencoder
from irasim_diffusers.training.datasets import check_frames

pytestmark = pytest.mark.usefixtures("offline")


def test_pipelines_models_and_missing_folders_are_told_apart(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_transformer().save_pretrained(tmp_path / "model")
    assert is_pipeline(str(tmp_path / "pipeline"))
    assert not is_pipeline(str(tmp_path / "model"))
    for name in ("nowhere", "org/nowhere", str(tmp_path / "nowhere")):
        message = (
            f"`pretrained_model_name_or_path` must be a folder or Hub id, got {name!r}: the folder does not exist"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            is_pipeline(name)


def test_missing_autoencoders_raise_one_line(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    load_autoencoder(f"{tmp_path / 'model'}:vae")
    message = "`pretrained` must be the folder or Hub id of an AutoencoderKL or AutoencoderTiny, got 'nowhere': the folder does not exist"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_autoencoder("nowhere", "pretrained")
    assert "\n" not in str(caught.value)


def test_sizes_are_checked_without_decoding_episodes(tmp_path, monkeypatch):
    frames = np.zeros((3, 10, 12, 3), np.uint8)
    setting = {"fps": 5, "camera": "observation.image", "tasks": [""]}
    write_file(tmp_path, 0, [Episode(frames, np.zeros((3, 2), np.float32))], **setting)
    write_metadata(tmp_path, frame_size=(10, 12), names={}, robot_type="test", **setting)
    source = PreparedEpisodes(LeRobotFolder(tmp_path))
    monkeypatch.delattr(PreparedEpisodes, "__getitem__")
    check_frames(source, None, 2)
    with pytest.raises(ValueError, match="must have sides divisible by 4, got 10x12: use --height 8 --width 12"):
        check_frames(source, None, 4)
