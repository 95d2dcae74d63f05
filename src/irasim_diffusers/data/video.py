"""Video files in and out, through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
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
        ValueError: If the file is missing, is no video, or holds no frame.
    """
    frames = list(iterate_video(path))
    if not frames:
        raise ValueError(f"{str(path)!r} holds no video frame; give a readable video file.")
    return np.stack(frames)


def iterate_video(path: str | os.PathLike | BinaryIO) -> Iterator[np.ndarray]:
    """Decode a video file one frame (H, W, 3), uint8 RGB, at a time.

    Raises:
        ValueError: If the file is missing or is no video.
    """
    source: Any = path if hasattr(path, "read") else os.fspath(path)
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise ValueError(f"{str(source)!r} has no video stream; give a video or image file.")
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {str(source)!r} as a video: {reason}.") from error


def read_frames(path: str | os.PathLike, start: int, count: int, fps: float, whole: bool = False) -> np.ndarray:
    """Decode only a part of a video: it seeks to the keyframe before.

    Args:
        path: The video file.
        start: Number of the first frame, counted at `fps` from time zero.
        count: Number of frames.
        fps: Frames per second.
        whole: Whether the video must end with them.

    Returns:
        Frames (count, H, W, 3), uint8 RGB.

    Raises:
        ValueError: If the file is missing, is no video, ends before, or goes on where it must end.
    """
    frames: list[np.ndarray] = []
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{os.fspath(path)!r} has no video stream; give a video or image file.")
            stream = container.streams.video[0]
            time_base = float(stream.time_base or 1 / fps)
            if start:
                container.seek(int((start - 0.5) / fps / time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                if len(frames) == count:
                    raise ValueError(f"{os.fspath(path)!r} goes on after the {count} frames of its episode.")
                if frame.pts is not None:
                    number = frame.pts * time_base * fps
                    if number < start - 0.5:
                        continue
                    if abs(number - start - len(frames)) > 0.5:
                        raise ValueError(
                            f"{os.fspath(path)!r} has no frame number {start + len(frames)} at {fps:g} frames/s: frames are "
                            "missing, or it has another rate."
                        )
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == count and not whole:
                    break
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {os.fspath(path)!r} as a video: {reason}.") from error
    if len(frames) < count:
        raise ValueError(
            f"{os.fspath(path)!r} ends early: {count} frames wanted from number {start}, {len(frames)} found."
        )
    return np.stack(frames)


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float, lossless: bool = False) -> Path:
    """Write an H.264 mp4 under a temporary name, then rename it.

    Args:
        path: The file to write; its suffix names the container.
        frames: Frames (T, H, W, 3), uint8 RGB.
        fps: Frames per second.
        lossless: Keep every RGB value (no chroma subsampling, no quantisation). Players in browsers read only the
            lossy form, whose height and width must be even.

    Returns:
        The path written.
    """
    path = Path(path)
    _, height, width, _ = frames.shape
    if not lossless and (height % 2 or width % 2):
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        _, height, width, _ = frames.shape
    codec, pixel_format = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
    options = {"crf": "0" if lossless else "16", "preset": "veryfast" if lossless else "medium", "g": "10"}
    with temporary_path(path) as partial, av.open(str(partial), mode="w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return path
