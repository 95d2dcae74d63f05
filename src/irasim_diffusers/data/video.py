"""Read and write video files through PyAV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ..files import temporary_path
from .pictures import stack_pictures

VideoFile: TypeAlias = str | os.PathLike | BinaryIO
PLAYLISTS = ("concat", "dash", "hls", "imf")
"""FFmpeg formats that refer to other files."""
ITU601, ITU709, MPEG_RANGE, JPEG_RANGE = 5, 1, 1, 2
"""FFmpeg enum values: color matrices and YUV ranges."""


def read_video(path: VideoFile, name: str | None = None) -> np.ndarray:
    """Decode every frame of a video file, with its display matrix applied.

    Args:
        path: Path of the video, or an open binary file, in any format that FFmpeg reads.
        name: Name in error messages (default: the path, or "the video" for an open file).

    Returns:
        Frames (T, H, W, 3), uint8 RGB.

    Raises:
        ValueError: If the file is missing, is not a video, is damaged, contains no frame, or has gray frames of more than 8 bits.
    """
    frames = list(iterate_video(path, name))
    if not frames:
        raise ValueError(f"{_name_of(path, name)} contains no video frame: pass a readable video file.")
    return stack_pictures(frames, _name_of(path, name), 0)


def iterate_video(path: VideoFile, name: str | None = None) -> Iterator[np.ndarray]:
    """Decode a video file one frame (H, W, 3), uint8 RGB, at a time; see `read_video`.

    Raises:
        ValueError: If the file is missing, is not a video, is damaged, or has gray frames of more than 8 bits.
    """
    name, reformatter = _name_of(path, name), VideoReformatter()
    with _open(path, name) as (container, stream):
        for frame in container.decode(stream):
            yield _pixels(_undamaged(frame, name), reformatter, name)


def read_frames(
    path: VideoFile,
    start: int,
    count: int,
    fps: float | None = None,
    whole: bool = False,
    name: str | None = None,
) -> np.ndarray:
    """Decode consecutive frames of a video, starting at a keyframe at or before the first one.

    Args:
        path: Path of the video, or an open binary file.
        start: Index of the first frame.
        count: Number of frames.
        fps: Frame rate that determines the index of a frame from its time. None numbers the frames in display order; the whole
            file is then read, but not decoded.
        whole: Whether the video must end after these frames.
        name: Name in error messages (default: the path, or "the video" for an open file).

    Returns:
        Frames (count, H, W, 3), uint8 RGB.

    Raises:
        ValueError: If the file is missing, is not a video, is damaged, has gray frames of more than 8 bits, does not contain one of
            the frames, or continues after them although `whole` is set.
    """
    return read_numbered_frames(path, range(start, start + count), fps, whole, name)


def read_numbered_frames(
    path: VideoFile,
    numbers: Sequence[int],
    fps: float | None = None,
    whole: bool = False,
    name: str | None = None,
) -> np.ndarray:
    """Decode the frames with these indices, in increasing order; see `read_frames`.

    Raises:
        ValueError: If the file is missing, is not a video, is damaged, has gray frames of more than 8 bits, does not contain one of
            the frames, or continues after them although `whole` is set.
    """
    wanted, name = [int(number) for number in numbers], _name_of(path, name)
    frames: list[np.ndarray] = []
    reformatter = VideoReformatter()
    with closing(_numbered_frames(path, wanted[0], fps, name)) as decoded:
        for number, frame in decoded:
            following = wanted[len(frames)] if len(frames) < len(wanted) else None
            if following is None:
                raise ValueError(f"{name} continues after the {len(wanted)} frames of its episode.")
            gap = not frames or following - wanted[len(frames) - 1] > 1
            if gap and number < following - 0.5:
                _undamaged(frame, name)  # later frames are predicted from it
                continue
            if not abs(number - following) <= 0.5:
                rate = "" if fps is None else f" at {fps:g} frames/s"
                raise ValueError(
                    f"{name} has no frame {following}{rate}: frames are missing, or the frame rate differs; encode the "
                    "video again at a constant rate."
                )
            frames.append(_pixels(_undamaged(frame, name), reformatter, name))
            if len(frames) == len(wanted) and not whole:
                break
    if len(frames) < len(wanted):
        raise ValueError(
            f"{name} ends early: {len(wanted)} frames required from index {wanted[0]}, {len(frames)} found."
        )
    return stack_pictures(frames, name, wanted[0] if wanted else 0)


def count_frames(path: VideoFile, name: str | None = None) -> int:
    """Count the frames of a video file without decoding them; see `read_video`.

    Raises:
        ValueError: If the file is missing, is not a video, contains no frame, or its packets cannot be read.
    """
    name = _name_of(path, name)
    with _open(path, name) as (container, stream):
        count = sum(1 for _ in _timestamps(container, stream))
    if not count:
        raise ValueError(f"{name} contains no video frame: pass a readable video file.")
    return count


def _name_of(path: VideoFile, name: str | None) -> str:
    """Return the name of a video in error messages."""
    return name or (repr(os.fspath(path)) if isinstance(path, str | os.PathLike) else "the video")


@contextmanager
def _open(path: VideoFile, name: str) -> Iterator[tuple[Any, Any]]:
    """Open a file and its first video stream; FFmpeg's errors become ValueError."""
    if isinstance(path, str | os.PathLike):
        source: Any = os.fspath(path)
    else:
        source = path
        source.seek(0)
    try:
        with av.open(source) as container:
            if container.format.name in PLAYLISTS:
                raise ValueError(f"{name} must be a video, got a list of other files ({container.format.name}).")
            if not container.streams.video:
                raise ValueError(f"{name} has no video stream: pass a video or image file.")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {name} as a video: {reason}.") from error


def _undamaged(frame: Any, name: str) -> Any:
    if frame.is_corrupt:  # the decoder concealed errors
        raise ValueError(f"{name} is damaged: a frame cannot be decoded completely.")
    return frame


def _pixels(frame: Any, reformatter: VideoReformatter, name: str) -> np.ndarray:
    """Convert a decoded frame to RGB (H, W, 3), uint8, by its color matrix, range and display matrix.

    The reformatter is shared by the frames of a video: `VideoFrame.reformat` prepares a new one for each frame, which takes
    several times as long as decoding a small frame.
    """
    pixel_format = frame.format.name
    if pixel_format.startswith("gray") and pixel_format not in ("gray", "gray8"):
        raise ValueError(
            f"{name} has frames of the format {pixel_format!r}, for example depth: 8-bit frames are required. Convert them "
            "to 8 bits, or select another camera."
        )
    if not pixel_format.startswith(("yuv", "nv", "p0")):
        return _upright(frame, reformatter.reformat(frame, format="rgb24").to_ndarray())
    matrix = int(frame.colorspace)
    full = pixel_format.startswith("yuvj") or int(frame.color_range) == JPEG_RANGE
    converted = reformatter.reformat(
        frame,
        format="rgb24",
        src_colorspace=matrix,
        dst_colorspace=ITU709 if matrix == ITU601 else ITU601,  # PyAV < 17 ignores the source matrix if both are equal
        src_color_range=JPEG_RANGE if full else MPEG_RANGE,
        dst_color_range=MPEG_RANGE,
    )
    return _upright(frame, converted.to_ndarray())


def _upright(frame: Any, pixels: np.ndarray) -> np.ndarray:
    """Apply the display matrix of a frame, which phones write, as quarter turns and reflections."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32)  # display x = a x + c y, display y = b x + d y
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _timestamps(container: Any, stream: Any) -> Iterator[int | None]:
    """Yield the presentation time of each frame in the order of the file, in the stream's time base.

    A time is None if it is unknown. Discarded packets are skipped.
    """
    return (packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _numbered_frames(
    path: VideoFile, start: int, fps: float | None, name: str
) -> Generator[tuple[float, Any], None, None]:
    """Yield decoded frames with their indices, from a keyframe at or before index `start`."""
    with _open(path, name) as (container, stream):
        times = list(islice(_timestamps(container, stream), None if fps is None else 16))
        reordered = container.format.name == "avi" and stream.codec_context.has_b_frames  # AVI has only decoding times
        known = [time for time in times if time is not None]
        if not reordered and len(known) == len(times):
            yield from _from_keyframe(container, stream, start, fps, known)
            return
    # without presentation times, as in raw H.264, the decoder's order counts
    with _open(path, name) as (container, stream):
        yield from enumerate(container.decode(stream))


def _from_keyframe(
    container: Any, stream: Any, start: int, fps: float | None, times: list[int]
) -> Iterator[tuple[float, Any]]:
    if fps is None:
        times = sorted(times)
        numbers = {time: number for number, time in enumerate(times)}

        def number_of(time: int | None) -> float:
            return numbers.get(time, math.nan) if time is not None else math.nan

        def time_of(number: int) -> int:
            return times[min(number, len(times) - 1)]
    else:
        scale = float(stream.time_base or 1 / fps) * fps

        def number_of(time: int | None) -> float:
            return math.nan if time is None else time * scale

        def time_of(number: int) -> int:
            return int((number - 0.5) / scale)

    back = 0
    while True:  # seeking uses decoding times, which may be earlier than presentation times
        first = max(start - back, 0)
        container.seek(time_of(first) if first else 0, stream=stream)
        decoded = container.decode(stream)
        head = next(decoded, None)
        if first == 0 or head is None or number_of(head.pts) <= start + 0.5:
            break
        back = 2 * back or 16
    for frame in decoded if head is None else chain([head], decoded):
        yield number_of(frame.pts), frame


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, lossless: bool = False) -> Path:
    """Write an H.264 video under a temporary name, then rename it.

    Args:
        path: The file to write; its suffix selects the container.
        frames: Frames (T, H, W, 3), uint8 RGB, or an iterable of frames.
        fps: Frames per second.
        lossless: Keep every RGB value, without chroma subsampling or quantization. Browsers play only lossy videos, which are
            padded to an even height and width.

    Returns:
        The path.

    Raises:
        ValueError: If there are no frames, or their sizes differ.
    """
    with video_writer(path, fps, lossless) as append:
        for frame in frames:
            append(frame)
    return Path(path)


@contextmanager
def video_writer(
    path: str | os.PathLike, fps: float, lossless: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends one frame (H, W, 3), uint8 RGB, to a video file; see `write_video`."""
    codec, pixel_format = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
    options = {"crf": "0" if lossless else "16", "preset": "veryfast" if lossless else "medium", "g": "10"}
    size: tuple[int, ...] = ()
    with temporary_path(path) as partial, av.open(str(partial), mode="w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.pix_fmt = pixel_format

        def append(frame: np.ndarray) -> None:
            nonlocal size
            if size and frame.shape != size:
                raise ValueError(f"`frames` must have one size, got {size} and {frame.shape}.")
            odd = ((0, 0), (0, 0)) if lossless else ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2))
            padded = np.pad(frame, (*odd, (0, 0)), mode="edge") if np.any(odd) else frame
            if not size:
                size = frame.shape
                stream.height, stream.width, _ = padded.shape
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")))

        yield append
        if not size:
            raise ValueError(f"`frames` must contain at least one frame to write to {str(path)!r}.")
        container.mux(stream.encode(None))
