import os
from pathlib import Path

import av
import numpy as np
import pytest

from irasim_diffusers.data import iterate_video, read_video, write_video

SHARED = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (7, 10, 14, 3), dtype=np.uint8)


def test_lossless_video_keeps_every_value(frames, tmp_path):
    assert np.array_equal(read_video(write_video(tmp_path / "a" / "clip.mp4", frames, 10, lossless=True)), frames)


def test_lossy_video_plays_anywhere(tmp_path):
    smooth = np.linspace(0, 200, 7 * 33 * 47 * 3).reshape(7, 33, 47, 3).astype(np.uint8)
    path = write_video(tmp_path / "clip.mp4", smooth, 12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 12.5
    decoded = read_video(path)
    assert decoded.shape == (7, 34, 48, 3)  # odd sizes are padded
    assert np.abs(decoded[:, :33, :47].astype(int) - smooth).mean() < 4


def test_nothing_is_left_half_written(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        write_video(tmp_path / "clip.mp4", np.zeros((2, 10, 14, 5), dtype=np.uint8), 10)
    assert not list(tmp_path.iterdir())


def test_unreadable_video_names_the_file(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is no video" * 100)
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        read_video(broken)
    with pytest.raises(ValueError, match=r"missing\.mp4"):
        list(iterate_video(tmp_path / "missing.mp4"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="IRASIM_TEST_DATA names no folder of robot clips")
def test_reads_real_robot_clips():
    frames = read_video(SHARED / "droid" / "videos" / "val" / "199" / "0.mp4")
    assert frames.shape[1:] == (192, 320, 3)
    assert len(frames) > 16
    assert frames.std() > 10
