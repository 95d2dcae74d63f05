"""Flags of the history frames: files of one or more cameras."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import embedded_checkpoint
from .files import IMAGE_SUFFIXES, check_name, read_media

if TYPE_CHECKING:
    from .. import IRASimPipeline


def add_history_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model and of the frames from which a prediction starts."""
    add = parser.add_argument
    add(
        "--model",
        default=str(embedded_checkpoint()),
        help="pipeline folder or Hub id (default: the embedded Push-T model)",
    )
    add(
        "--frames",
        nargs="+",
        metavar="FILE",
        help="image, or video that starts with the history frames; for several cameras, one file each, in the order of the "
        "model's `cameras`. Without this config entry, the files are stacked vertically; left.mp4,right.mp4 joins two horizontally "
        "(default, except for plan and with --model: the held-out clip of the embedded model)",
    )
    add(
        "--history",
        type=int,
        help="number of history frames to take from a video (default: the model's maximum; Video-Ada and the U-Net accept no "
        "other number)",
    )
    add("--resize", action="store_true", help="resize the input images to the model's size")


def frame_files(arguments: argparse.Namespace) -> list[list[Path]]:
    """Return the files of `--frames` in rows, from top to bottom and left to right."""
    return [
        [Path(row)] if Path(row).exists() else [Path(name) for name in row.split(",")]
        for row in arguments.frames or []
    ]


def check_start(arguments: argparse.Namespace) -> None:
    """Raise ValueError if `--frames` is missing; only the embedded model has default frames."""
    if not arguments.frames and arguments.model != str(embedded_checkpoint()):
        raise ValueError(
            "--frames is required with --model: an image or video of the robot from which the prediction starts."
        )


def read_views(rows: list[list[Path]]) -> list[list[np.ndarray]]:
    """Read the frames (T, H, W, 3) of the cameras; without rows, read the embedded clip.

    Raises:
        ValueError: If a file cannot be read.
    """
    for row in rows:
        for path in row:
            check_name("--frames", path)
    return [[read_media(path) for path in row] for row in rows or [[embedded_checkpoint() / "example.mp4"]]]


def tile_views(views: list[list[np.ndarray]], cameras: list[list[str]] | None) -> np.ndarray:
    """Join the frames of several cameras into one video (T, H, W, 3).

    Args:
        views: Frames of each camera, in rows.
        cameras: Camera names of the checkpoint, in rows; None uses the rows of `views`.

    Raises:
        ValueError: If the checkpoint has a different number of cameras, the videos differ in length, or the frames do not form a
            rectangle.
    """
    from ..data import tile

    flat = [view for row in views for view in row]
    if len(flat) == 1:  # one file, which may already show all cameras
        return flat[0]
    shape = [len(row) for row in cameras or views]
    if sum(shape) != len(flat):
        names = ", ".join(name for row in cameras or [] for name in row)
        raise ValueError(f"--frames must be one file for each camera of the model, {names}, got {len(flat)} files.")
    if len({len(view) for view in flat}) > 1:
        lengths = ", ".join(str(len(view)) for view in flat)
        raise ValueError(f"--frames must have the same number of frames for each camera, got {lengths}.")
    numbers = iter(range(len(flat)))
    layout = tuple(tuple(str(next(numbers)) for _ in range(size)) for size in shape)
    try:
        return tile(layout, {str(number): view for number, view in enumerate(flat)})
    except ValueError as error:
        sizes = ", ".join(f"{view.shape[1]}x{view.shape[2]}" for view in flat)
        raise ValueError(
            f"--frames must form a rectangle when tiled, got {sizes} (height x width): resize the files."
        ) from error


def history_length(arguments: argparse.Namespace, pipeline: IRASimPipeline, num_frames: int) -> int:
    """Return the number of history frames to take from a video of `num_frames` frames.

    Raises:
        ValueError: If `--history` is out of range, or the video is too short.
    """
    most = pipeline.transformer.config.num_history_frames
    is_exact = pipeline.transformer.config.conditioning == "video"
    wanted = most if arguments.history is None else arguments.history
    if is_exact and wanted != most:
        raise ValueError(f"--history must be {most} for this model, got {wanted}.")
    if wanted < 1:
        raise ValueError(f"--history must be at least 1, got {wanted}.")
    if wanted > most:
        raise ValueError(f"--history must be at most {most} for this model, got {wanted}.")
    files = [path for row in frame_files(arguments) for path in row]
    if arguments.history is None and files and all(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return 1
    if num_frames < wanted:
        remedy = "use a longer video" + ("" if is_exact else f", or --history {num_frames}")
        raise ValueError(f"--frames must contain at least {wanted} frames (the history), got {num_frames}: {remedy}.")
    return wanted
