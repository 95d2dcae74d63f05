import os
from pathlib import Path

import av
import numpy as np
import pytest

from irasim_diffusers.data import count_frames, iterate_video, read_frames, read_video, write_video

SHARED = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (7, 10, 14, 3), dtype=np.uint8)


def test_lossless_video_keeps_every_value(frames, tmp_path):
    assert np.array_equal(read_video(write_video(tmp_path / "a" / "clip.mp4", frames, 10, lossless=True)), frames)


def encode(path, codec, options, frames=40):
    """A picture that moves, as a codec keeps it."""
    picture = np.random.default_rng(1).integers(0, 128, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            moved = np.roll(picture, (number, 2 * number), (0, 1)) + number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.mp4", "libx264", {"g": "1"}),
        ("clip.mp4", "libx264", {"g": "2"}),
        ("clip.mp4", "libx264", {"g": "250"}),
        ("clip.mp4", "libx264", {"g": "11", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}),
        ("clip.mkv", "libx264", {"g": "12", "bf": "3"}),
        ("clip.mp4", "libsvtav1", {"g": "2", "preset": "12"}),
        ("clip.mp4", "libsvtav1", {"g": "16", "preset": "12"}),
        ("clip.mp4", "libsvtav1", {"g": "161", "preset": "12"}),
        ("clip.avi", "mpeg4", {"g": "12", "bf": "2"}),
    ],
)
def test_every_window_is_that_of_the_whole(name, codec, options, tmp_path):
    path = encode(tmp_path / name, codec, options)
    whole = read_video(path)
    assert count_frames(path) == len(whole) == 40
    for start in range(40):
        length = min(3, 40 - start)
        for fps in (None,) if name.endswith("avi") else (None, 30):
            assert np.array_equal(read_frames(path, start, length, fps), whole[start : start + length]), (start, fps)
    with pytest.raises(ValueError, match=r"ends early: 3 frames wanted from number 38, 2 found"):
        read_frames(path, 38, 3)
    with pytest.raises(ValueError, match=r"ends early: 3 frames wanted from number 50, 0 found"):
        read_frames(path, 50, 3)
    with pytest.raises(ValueError, match=r"goes on after the 3 frames"):
        read_frames(path, 36, 3, whole=True)
    assert len(read_frames(path, 37, 3, whole=True)) == 3


def test_frames_at_uneven_times_are_numbered_in_their_order(frames, tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), mode="w") as container:
        stream = container.add_stream("libx264rgb", rate=10, options={"crf": "0", "g": "3"})
        stream.width, stream.height, stream.pix_fmt = 14, 10, "rgb24"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number + 4 * (number > 3)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for start in range(6):
        assert np.array_equal(read_frames(tmp_path / "clip.mp4", start, 2), frames[start : start + 2])
    with pytest.raises(ValueError, match=r"has no frame number 4 at 10 frames/s"):
        read_frames(tmp_path / "clip.mp4", 2, 3, 10)


def test_damaged_and_cut_videos_are_refused(tmp_path):
    path = encode(tmp_path / "clip.mp4", "libx264", {"g": "250", "crf": "30"})
    content = path.read_bytes()
    middle = content.index(b"mdat") + len(content) // 3
    hole = bytes(255 - byte for byte in content[middle : middle + 400])  # a decoder paints over it
    path.write_bytes(content[:middle] + hole + content[middle + 400 :])
    with pytest.raises(ValueError, match=r"clip\.mp4' is damaged|cannot read .*clip\.mp4"):
        read_video(path)
    with pytest.raises(ValueError, match=r"clip\.mp4' is damaged|cannot read .*clip\.mp4"):
        read_frames(path, 36, 4)
    path.write_bytes(content[: len(content) // 2])
    for read in (read_video, count_frames, lambda path: read_frames(path, 0, 4)):
        with pytest.raises(ValueError, match=r"cannot read .*clip\.mp4"):
            read(path)


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


def test_frames_come_one_after_the_other_and_of_one_size(frames, tmp_path):
    path = write_video(tmp_path / "clip.mp4", (frame for frame in frames), 10, lossless=True)
    assert np.array_equal(read_video(path), frames)
    for wrong, message in (([], "must hold one or more"), ([frames[0], frames[1, :8]], "must be of one size")):
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / "wrong.mp4", wrong, 10)
    assert list(tmp_path.iterdir()) == [path]


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
    for start in range(0, len(frames) - 16, 5):
        window = read_frames(SHARED / "droid" / "videos" / "val" / "199" / "0.mp4", start, 16)
        assert np.array_equal(window, frames[start : start + 16])
