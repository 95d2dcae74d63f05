"""Files from outside: actions, pictures and videos, of bounded size, or a message that says what is wrong."""

import csv
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from irasim_diffusers.commands.files import IMAGE_SUFFIXES, read_actions
from irasim_diffusers.data import iterate_video

ACTION_SUFFIXES = (".npy", ".csv", ".json")
MAX_ACTIONS = 240  # of one prediction: 24 seconds at 10 Hz
MAX_ACTION_BYTES = 2**20
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PICTURE_BYTES = 10_000_000
MAX_PICTURE_PIXELS = 25_000_000
MAX_FRAME_PIXELS = 2**24  # of a video


def read_action_file(path: str | Path, action_dim: int) -> np.ndarray:
    """Actions (n, A), float64, from an uploaded .npy (without pickles), .csv or .json file.

    Raises:
        ValueError: If there are none, too many, of another dimension or not finite, or it is no such file.
    """
    path = Path(path)
    if path.suffix.lower() not in ACTION_SUFFIXES:
        raise ValueError(f"Actions are a .npy, .csv or .json file, not {path.name!r}.")
    if path.stat().st_size > MAX_ACTION_BYTES:
        raise ValueError(f"{path.name} is too large: an action file has at most {MAX_ACTION_BYTES >> 20} MB.")
    try:
        actions = read_actions(path)
    except (ValueError, csv.Error, zipfile.BadZipFile, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{path.name} holds no table of numbers, a row of {action_dim} for each frame to predict."
        ) from error
    if actions.shape[1] != action_dim:
        raise ValueError(
            f"{path.name} has {actions.shape[1]} numbers a row, and this model takes actions of {action_dim}."
        )
    return check_actions(actions, path.name)


def check_actions(actions: np.ndarray, name: str) -> np.ndarray:
    """The actions (n, A), unless there are none or too many of them, or some are not finite.

    Raises:
        ValueError: If so.
    """
    if not 1 <= len(actions) <= MAX_ACTIONS:
        raise ValueError(f"{name} has {len(actions)} actions: give 1 to {MAX_ACTIONS}.")
    if not np.isfinite(actions).all():
        row = int(np.nonzero(~np.isfinite(actions).all(axis=1))[0][0])
        raise ValueError(f"{name} has {actions[row].tolist()} in row {row + 1}: every number must be finite.")
    return actions


def read_picture(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3), uint8, upright, its middle cut to the shape of `size` (height, width).

    Raises:
        ValueError: If it is too large, or no whole picture of a known format.
    """
    path = Path(path)
    if (large := path.stat().st_size) > MAX_PICTURE_BYTES:
        raise ValueError(f"the picture must have at most {MAX_PICTURE_BYTES // 10**6} MB, got {large / 1e6:.0f} MB.")
    pixels = f"the picture must have at most {MAX_PICTURE_PIXELS // 10**6} million pixels"
    try:
        with PIL.Image.open(path, formats=PICTURE_FORMATS) as image:
            if image.width * image.height > MAX_PICTURE_PIXELS:  # known before a pixel is decoded
                raise ValueError(f"{pixels}, got {image.width}x{image.height}.")
            upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{pixels}: {error}") from error
    except (OSError, SyntaxError) as error:
        reason = str(error).replace(str(path), "it")
        raise ValueError(f"the file must be a whole picture, {', '.join(PICTURE_FORMATS)}: {reason}.") from error
    return np.asarray(PIL.ImageOps.fit(upright, size[::-1], PIL.Image.Resampling.LANCZOS))


def read_clip(path: str | Path, size: tuple[int, int], length: int) -> np.ndarray:
    """The first frames of an uploaded video, or a picture as a video of one.

    Args:
        path: The file.
        size: Height and width to bring them to.
        length: Frames, at most; no more are decoded.

    Returns:
        Frames (T, H, W, 3), uint8.

    Raises:
        ValueError: If it is neither, is damaged, or is too large.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return read_picture(path, size)[None]
    try:
        clip = [resize(frame[None], size)[0] for frame in islice(_read_frames(path), length)]
    except TooLarge:
        raise
    except (ValueError, av.error.FFmpegError) as error:
        raise ValueError(f"{path.name} cannot be read as a video, or is damaged.") from error
    if not clip:
        raise ValueError(f"{path.name} has no frame.")
    return np.stack(clip)


class TooLarge(ValueError):
    """A video of too many pixels."""


def _read_frames(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        head = file.read(12)
    # by content, for FFmpeg follows what is written in a playlist, whatever its name
    if not (head[4:8] == b"ftyp" or head.startswith((b"\x1aE\xdf\xa3", b"GIF8")) or head[8:] == b"AVI "):
        raise ValueError("no container of videos")
    with av.open(str(path)) as container:
        for stream in container.streams.video:  # before they are decoded
            _check_pixels(stream.height, stream.width, path)
    for frame in iterate_video(path):
        _check_pixels(frame.shape[0], frame.shape[1], path)  # the header may say less
        yield frame


def _check_pixels(height: int, width: int, path: Path) -> None:
    if height * width > MAX_FRAME_PIXELS:
        raise TooLarge(f"{path.name} has {width}x{height} pixels: give at most {MAX_FRAME_PIXELS >> 20} million.")


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames (T, H, W, 3), uint8, of another height and width, as the pipeline resizes."""
    if frames.shape[1:3] == size:
        return frames
    pixels = torch.tensor(frames).permute(0, 3, 1, 2).float()
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
