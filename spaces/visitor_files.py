"""Uploaded files of limited size: actions, images and videos."""

import csv
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np

from irasim_diffusers import data
from irasim_diffusers.commands import IMAGE_SUFFIXES, read_actions
from irasim_diffusers.data import iterate_video
from irasim_diffusers.pictures import resize_video as resize

ACTION_SUFFIXES = (".npy", ".csv", ".json")
MAX_ACTIONS = 240  # per prediction: 24 seconds at 10 Hz
MAX_ACTION_BYTES = 2**20
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PICTURE_BYTES = 10_000_000
MAX_PICTURE_PIXELS = 25_000_000
MAX_FRAME_PIXELS = 2**24  # per frame of a video


def read_action_file(path: str | Path, action_dim: int) -> np.ndarray:
    """Read actions (n, A), float64, from an uploaded .npy (without pickles), .csv or .json file.

    Raises:
        ValueError: If the file is too large or has another format, if there are no or too many actions, or if they are not finite
            or do not have `action_dim` components.
    """
    path = Path(path)
    if path.suffix.lower() not in ACTION_SUFFIXES:
        raise ValueError(f"actions must be a .npy, .csv or .json file, got {path.name!r}.")
    if path.stat().st_size > MAX_ACTION_BYTES:
        raise ValueError(f"{path.name} is too large: an action file can have at most {MAX_ACTION_BYTES >> 20} MB.")
    try:
        actions = read_actions(path)
    except (ValueError, csv.Error, zipfile.BadZipFile, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{path.name} contains no table of numbers: it must have one row of {action_dim} numbers per frame to predict."
        ) from error
    if actions.shape[1] != action_dim:
        raise ValueError(
            f"{path.name} has {actions.shape[1]} numbers per row, but the actions of this model have {action_dim} components."
        )
    return check_actions(actions, path.name)


def check_actions(actions: np.ndarray, name: str) -> np.ndarray:
    """Check actions (n, A) and return them.

    Raises:
        ValueError: If there are none or too many, or some are not finite.
    """
    if not 1 <= len(actions) <= MAX_ACTIONS:
        raise ValueError(f"{name} has {len(actions)} actions: upload 1 to {MAX_ACTIONS}.")
    if not np.isfinite(actions).all():
        row = int(np.nonzero(~np.isfinite(actions).all(axis=1))[0][0])
        raise ValueError(f"{name} has {actions[row].tolist()} in row {row + 1}: every number must be finite.")
    return actions


def read_picture(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """Read an uploaded image, apply its EXIF orientation, and crop and resize it with `fit`.

    Args:
        path: The file.
        size: Height and width.

    Returns:
        The image (H, W, 3), uint8.

    Raises:
        ValueError: If the file is too large, damaged or animated, or has another format or bit depth.
    """
    path = Path(path)
    if (large := path.stat().st_size) > MAX_PICTURE_BYTES:
        raise ValueError(
            f"the image must be at most {MAX_PICTURE_BYTES // 10**6} MB, got {large / 1e6:.2f} MB: upload a smaller file."
        )
    try:
        pixels = data.read_picture(path, "in the file", formats=PICTURE_FORMATS, max_pixels=MAX_PICTURE_PIXELS)
    except ValueError as error:
        reason = str(error).replace(repr(str(path)), "it").replace(str(path), "it").rstrip(".")
        raise ValueError(f"the file must be a complete image, {', '.join(PICTURE_FORMATS)}: {reason}.") from error
    return fit(pixels[None], size)[0]


def read_clip(path: str | Path, size: tuple[int, int], length: int) -> np.ndarray:
    """Read the first frames of an uploaded video, or an image as a video of one frame.

    Args:
        path: The file.
        size: Height and width; frames are cropped and resized with `fit`.
        length: Maximum number of frames; later frames are not decoded.

    Returns:
        Frames (T, H, W, 3), uint8.

    Raises:
        ValueError: If the file is too large, damaged or empty, or neither a video nor an image.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return read_picture(path, size)[None]
    try:
        clip = [fit(frame[None], size)[0] for frame in islice(_read_frames(path), length)]
    except TooLarge:
        raise
    except (ValueError, av.error.FFmpegError) as error:
        raise ValueError(f"{path.name} cannot be read as a video: it has another format, or is damaged.") from error
    if not clip:
        raise ValueError(f"{path.name} has no frames.")
    return np.stack(clip)


class TooLarge(ValueError):
    """Raised for videos with too many pixels per frame."""


def _read_frames(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        head = file.read(12)
    # checked by content: FFmpeg would open the files listed in a playlist, whatever the playlist is called
    if not (head[4:8] == b"ftyp" or head.startswith((b"\x1aE\xdf\xa3", b"GIF8")) or head[8:] == b"AVI "):
        raise ValueError("the file is not a video container")
    with av.open(str(path)) as container:
        for stream in container.streams.video:  # before any frame is decoded
            _check_pixels(stream.height, stream.width, path)
    for frame in iterate_video(path):
        _check_pixels(frame.shape[0], frame.shape[1], path)  # the header may be wrong
        yield frame


def _check_pixels(height: int, width: int, path: Path) -> None:
    if height * width > MAX_FRAME_PIXELS:
        raise TooLarge(
            f"{path.name} has {width}x{height} pixels: upload a video with at most {MAX_FRAME_PIXELS >> 20} million per frame."
        )


def fit(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop the center of frames (T, H, W, 3), uint8, and resize it to `size`, height and width."""
    height, width = frames.shape[1:3]
    scale = min(height / size[0], width / size[1])
    rows, columns = (max(1, round(scale * side)) for side in size)
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize(frames[:, top : top + rows, left : left + columns], size)
