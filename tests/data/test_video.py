import functools
import io
import os
import struct
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

from irasim_diffusers.data import count_frames, iterate_video, read_frames, read_picture, read_video, write_video

SHARED = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (7, 10, 14, 3), dtype=np.uint8)


def test_lossless_video_keeps_every_value(frames, tmp_path):
    assert np.array_equal(read_video(write_video(tmp_path / "a" / "clip.mp4", frames, 10, lossless=True)), frames)


def encode(path, codec, options, frames=40):
    """Encode a video of a random picture that moves and becomes brighter."""
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
        ("clip.avi", "libx264", {"g": "12", "bf": "2"}),
        ("clip.avi", "libx264", {"g": "12", "bf": "0"}),
        ("clip.h264", "libx264", {"g": "12", "bf": "2"}),
    ],
)
def test_every_window_matches_the_whole_video(name, codec, options, tmp_path):
    path = encode(tmp_path / name, codec, options)
    whole = read_video(path)
    assert count_frames(path) == len(whole) == 40
    for start in range(40):
        length = min(3, 40 - start)
        for fps in (None,) if name == "clip.avi" else (None, 30):
            assert np.array_equal(read_frames(path, start, length, fps), whole[start : start + length]), (start, fps)
    with pytest.raises(ValueError, match=r"ends early: 3 frames required from index 38, 2 found"):
        read_frames(path, 38, 3)
    with pytest.raises(ValueError, match=r"ends early: 3 frames required from index 50, 0 found"):
        read_frames(path, 50, 3)
    with pytest.raises(ValueError, match=r"continues after the 3 frames"):
        read_frames(path, 36, 3, whole=True)
    assert len(read_frames(path, 37, 3, whole=True)) == 3


COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (200, 40, 200), (40, 200, 200), (90, 60, 30)]


@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9], ids=["BT.709", "BT.470BG", "BT.601", "SMPTE 240M", "BT.2020"])
@pytest.mark.parametrize("color_range", [1, 2], ids=["limited", "full"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p10le"])
def test_colors_use_the_matrix_and_range_of_the_stream(matrix, color_range, pixel_format, tmp_path):
    luma = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}.get(matrix, (0.299, 0.114))
    red, blue = luma
    depth = 10 if pixel_format.endswith("10le") else 8
    rgb = np.array(COLORS) / 255
    y = rgb @ [red, 1 - red - blue, blue]
    chroma = [(rgb[:, 2] - y) / (2 - 2 * blue), (rgb[:, 0] - y) / (2 - 2 * red)]
    black, white, width = (0, 255, 255) if color_range == 2 else (16, 235, 224)
    values = [black + y * (white - black), *(128 + channel * width for channel in chroma)]
    path = tmp_path / "clip.mp4"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 16 * len(COLORS), 32, pixel_format
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        frame = av.VideoFrame(stream.width, stream.height, pixel_format)
        for plane, row in zip(frame.planes, values, strict=True):
            bars = np.repeat(np.round(row * (4 if depth == 10 else 1)), plane.width // len(COLORS))
            line = np.zeros(plane.line_size // (2 if depth == 10 else 1), np.uint16 if depth == 10 else np.uint8)
            line[: len(bars)] = bars
            plane.update(np.tile(line, (plane.height, 1)).tobytes())
        frame.colorspace, frame.color_range = matrix, color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(read_video(path)[0][16, 8::16].astype(int) - COLORS).max() <= 4


TURNS = {  # the display matrix's a, b, c, d: display x = a x + c y, display y = b x + d y
    (1, 0, 0, 1): lambda frame: frame,
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (-1, 0, 0, -1): lambda frame: np.rot90(frame, 2),
    (0, -1, 1, 0): lambda frame: np.rot90(frame, 1),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda frame: frame.swapaxes(0, 1),
}


@pytest.mark.parametrize("turn", TURNS)
def test_videos_are_read_upright(turn, frames, tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames, 10, lossless=True)
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 8 + 20 + 8 + 8
    a, b, c, d = (value << 16 for value in turn)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    upright = np.stack([TURNS[turn](frame) for frame in frames])
    assert np.array_equal(read_video(path), upright)
    assert np.array_equal(read_frames(path, 2, 3), upright[2:5])


def test_depth_videos_raise(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "gray16le"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16), 700, np.uint16), format="gray16le")))
        container.mux(stream.encode(None))
    for read in (read_video, lambda path: read_frames(path, 0, 1)):
        with pytest.raises(ValueError, match=r"clip\.mkv' has frames of the format 'gray16le'"):
            read(path)


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_pictures_are_read_upright(turn, frames, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = turn
    stored = PIL.Image.fromarray(frames[0])
    stored.save(tmp_path / "picture.png", exif=exif)
    upright = {
        1: frames[0],
        2: np.fliplr(frames[0]),
        3: np.rot90(frames[0], 2),
        4: np.flipud(frames[0]),
        5: frames[0].swapaxes(0, 1),
        6: np.rot90(frames[0], -1),
        7: np.rot90(frames[0], 2).swapaxes(0, 1),
        8: np.rot90(frames[0], 1),
    }[turn]
    assert np.array_equal(read_picture(tmp_path / "picture.png"), upright)


@pytest.mark.parametrize(
    ("picture", "suffix"),
    [
        (np.full((4, 6), 700, np.uint16), "png"),
        (np.full((4, 6), 700, np.uint16), "tiff"),
        (np.full((4, 6), 0.7, np.float32), "tiff"),
        (np.full((4, 6), 700, np.int32), "tiff"),
    ],
)
def test_depth_pictures_raise(picture, suffix, tmp_path):
    path = tmp_path / f"depth.{suffix}"
    PIL.Image.fromarray(picture).save(path)
    with pytest.raises(ValueError, match=rf"depth\.{suffix}' has mode '[IF].*8-bit RGB or grayscale is required"):
        read_picture(path)


def test_8_bit_pictures_are_converted_to_rgb(tmp_path):
    gray = np.arange(24, dtype=np.uint8).reshape(4, 6)
    rgb = np.stack([gray, gray + 50, gray + 100], axis=-1)
    for name, array, wanted in (
        ("gray", gray, np.repeat(gray[:, :, None], 3, 2)),
        ("rgba", np.dstack([rgb, np.full((4, 6), 90, np.uint8)]), rgb),
        ("black and white", gray > 10, np.repeat((gray > 10)[:, :, None] * np.uint8(255), 3, 2)),
    ):
        PIL.Image.fromarray(array).save(tmp_path / f"{name}.png")
        assert np.array_equal(read_picture(tmp_path / f"{name}.png"), wanted), name
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read image .*broken\.png"):
        read_picture(tmp_path / "broken.png")
    with pytest.raises(ValueError, match="cannot read image in the open file: its format is unknown"):
        read_picture(io.BytesIO(b"nothing"))


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff"])
def test_animated_pictures_raise(suffix, frames, tmp_path):
    first, *others = [PIL.Image.fromarray(frame) for frame in frames[:3]]
    first.save(tmp_path / f"moving.{suffix}", save_all=True, append_images=others)
    with pytest.raises(ValueError, match=rf"moving\.{suffix}' is animated \(3 frames\): convert it to a video"):
        read_picture(tmp_path / f"moving.{suffix}")


def test_photos_with_a_preview_are_read(tmp_path):
    first, second = (PIL.Image.new("RGB", (24, 16), color) for color in ("red", "blue"))
    first.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[second])
    assert np.abs(read_picture(tmp_path / "photo.jpg").astype(int) - np.asarray(first)).max() < 3


def test_large_pictures_raise_before_they_are_decoded(tmp_path):
    PIL.Image.new("1", (10_000, 6_401)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"at most 64 million pixels, got 10000x6401: resize it"):
        read_picture(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"at most 0\.5 million pixels"):
        read_picture(tmp_path / "large.png", max_pixels=500_000)


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
    with pytest.raises(ValueError, match=r"has no frame 4 at 10 frames/s"):
        read_frames(tmp_path / "clip.mp4", 2, 3, 10)


def test_damaged_and_truncated_videos_raise(tmp_path):
    path = encode(tmp_path / "clip.mp4", "libx264", {"g": "250", "crf": "30"})
    content = path.read_bytes()
    middle = content.index(b"mdat") + len(content) // 3
    hole = bytes(255 - byte for byte in content[middle : middle + 400])  # decoders conceal this damage
    path.write_bytes(content[:middle] + hole + content[middle + 400 :])
    with pytest.raises(ValueError, match=r"clip\.mp4' is damaged|cannot read .*clip\.mp4"):
        read_video(path)
    with pytest.raises(ValueError, match=r"clip\.mp4' is damaged|cannot read .*clip\.mp4"):
        read_frames(path, 36, 4)
    path.write_bytes(content[: len(content) // 2])
    for read in (read_video, count_frames, lambda path: read_frames(path, 0, 4)):
        with pytest.raises(ValueError, match=r"cannot read .*clip\.mp4"):
            read(path)


def test_lossy_video_is_playable_by_browsers(tmp_path):
    smooth = np.linspace(0, 200, 7 * 33 * 47 * 3).reshape(7, 33, 47, 3).astype(np.uint8)
    path = write_video(tmp_path / "clip.mp4", smooth, 12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 12.5
    decoded = read_video(path)
    assert decoded.shape == (7, 34, 48, 3)  # odd sizes are padded
    assert np.abs(decoded[:, :33, :47].astype(int) - smooth).mean() < 4


def test_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        write_video(tmp_path / "clip.mp4", np.zeros((2, 10, 14, 5), dtype=np.uint8), 10)
    assert not list(tmp_path.iterdir())


def test_frames_are_written_one_by_one_and_must_have_one_size(frames, tmp_path):
    path = write_video(tmp_path / "clip.mp4", (frame for frame in frames), 10, lossless=True)
    assert np.array_equal(read_video(path), frames)
    for wrong, message in (([], "must contain at least one"), ([frames[0], frames[1, :8]], "must have one size")):
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
    for name, message in ((None, "the video"), ("camera 1", "camera 1")):
        for read in (read_video, count_frames, functools.partial(read_frames, start=0, count=1)):
            with broken.open("rb") as file, pytest.raises(ValueError, match=f"cannot read {message} as a video"):
                read(file, name=name)


@pytest.mark.skipif(not SHARED.is_dir(), reason="IRASIM_TEST_DATA is not a folder of robot clips")
def test_reads_real_robot_clips():
    frames = read_video(SHARED / "droid" / "videos" / "val" / "199" / "0.mp4")
    assert frames.shape[1:] == (192, 320, 3)
    assert len(frames) > 16
    assert frames.std() > 10
    for start in range(0, len(frames) - 16, 5):
        window = read_frames(SHARED / "droid" / "videos" / "val" / "199" / "0.mp4", start, 16)
        assert np.array_equal(window, frames[start : start + 16])
