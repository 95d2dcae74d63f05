"""Video files in and out, through PyAV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from ..files import temporary_path


def read_video(path: str | os.PathLike | BinaryIO) -> np.ndarray:
    """Decode every frame of a video file.

    Args:
        path: The video file, or an open one; every format of FFmpeg works.

    Returns:
        Frames (T, H, W, 3), uint8 RGB.

    Raises:
        ValueError: If the file is missing, is no video, is damaged, or holds no frame.
    """
    frames = list(iterate_video(path))
    if not frames:
        raise ValueError(f"{str(path)!r} holds no video frame; give a readable video file.")
    return np.stack(frames)


def iterate_video(path: str | os.PathLike | BinaryIO) -> Iterator[np.ndarray]:
    """Decode a video file one frame (H, W, 3), uint8 RGB, at a time.

    Raises:
        ValueError: If the file is missing, is no video, or is damaged.
    """
    with _open(path) as (container, stream):
        for frame in container.decode(stream):
            yield _whole(frame, path).to_ndarray(format="rgb24")


def read_frames(
    path: str | os.PathLike | BinaryIO, start: int, count: int, fps: float | None = None, whole: bool = False
) -> np.ndarray:
    """Decode only a part of a video, from the keyframe before it on.

    Args:
        path: The video file, or an open one.
        start: Number of the first frame.
        count: Number of frames.
        fps: Frames per second, by which frames are numbered from time zero. None numbers them in their order, whatever
            their times, for which all of the file is read, though not decoded.
        whole: Whether the video must end with them.

    Returns:
        Frames (count, H, W, 3), uint8 RGB.

    Raises:
        ValueError: If the file is missing, is no video, is damaged, ends before, or goes on where it must end.
    """
    frames: list[np.ndarray] = []
    with _open(path) as (container, stream):
        for number, frame in _decode_from(container, stream, start, fps):
            if number < start - 0.5:
                _whole(frame, path)  # those after it are made from it
                continue
            if len(frames) == count:
                raise ValueError(f"{str(path)!r} goes on after the {count} frames of its episode.")
            if not abs(number - start - len(frames)) <= 0.5:
                rate = "" if fps is None else f" at {fps:g} frames/s"
                raise ValueError(
                    f"{str(path)!r} has no frame number {start + len(frames)}{rate}: frames are missing, or it has another "
                    "rate."
                )
            frames.append(_whole(frame, path).to_ndarray(format="rgb24"))
            if len(frames) == count and not whole:
                break
    if len(frames) < count:
        raise ValueError(f"{str(path)!r} ends early: {count} frames wanted from number {start}, {len(frames)} found.")
    return np.stack(frames)


def count_frames(path: str | os.PathLike | BinaryIO) -> int:
    """Number of frames of a video file, without decoding them.

    Raises:
        ValueError: If the file is missing or is no video.
    """
    with _open(path) as (container, stream):
        return len(_timestamps(container, stream))


@contextmanager
def _open(path: str | os.PathLike | BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The file with its first video stream."""
    source: Any = path if hasattr(path, "read") else os.fspath(path)
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise ValueError(f"{str(source)!r} has no video stream; give a video or image file.")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {str(source)!r} as a video: {reason}.") from error


def _whole(frame: Any, path: str | os.PathLike | BinaryIO) -> Any:
    """The frame, unless it is damaged."""
    if frame.is_corrupt:  # the decoder has painted over what is missing
        raise ValueError(f"{str(path)!r} is damaged: a frame cannot be decoded whole.")
    return frame


def _timestamps(container: Any, stream: Any) -> list[int | None]:
    """When each frame is shown, in the order of the file, in the stream's time base."""
    return [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]


def _decode_from(container: Any, stream: Any, start: int, fps: float | None) -> Iterator[tuple[float, Any]]:
    """Frames with their numbers, from a keyframe at or before number `start` on."""
    if fps is None:
        times = sorted(time for time in _timestamps(container, stream) if time is not None)
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
    while True:  # the time by which a keyframe is found may be earlier than the one at which it is shown
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
    """Write an H.264 mp4 under a temporary name, then rename it.

    Args:
        path: The file to write. Its suffix names the container.
        frames: Frames (T, H, W, 3), uint8 RGB, or an iterable of frames (H, W, 3).
        fps: Frames per second.
        lossless: Keep every RGB value (no chroma subsampling, no quantisation). Browsers play only the lossy form, whose
            height and width must be even.

    Returns:
        The path written.

    Raises:
        ValueError: If there is no frame, or their sizes differ.
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
                raise ValueError(f"`frames` must be of one size, got {size} and {frame.shape}.")
            odd = ((0, 0), (0, 0)) if lossless else ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2))
            padded = np.pad(frame, (*odd, (0, 0)), mode="edge") if np.any(odd) else frame
            if not size:
                size = frame.shape
                stream.height, stream.width, _ = padded.shape
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")))

        yield append
        if not size:
            raise ValueError(f"`frames` must hold one or more to be written to {str(path)!r}.")
        container.mux(stream.encode(None))
