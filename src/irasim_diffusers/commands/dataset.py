"""Flags that select recorded episodes, shared by the commands that read them."""

from __future__ import annotations

import argparse
import math
from typing import Any

from .files import check_flag_ranges, check_name

MAX_SIDE = 8192
"""Maximum height and width of resized frames, in pixels, which bounds the memory that a flag can request."""


def add_dataset_flags(parser: argparse.ArgumentParser, split: str | None, required: bool = True) -> None:
    """Add the flags that `open_dataset` reads.

    Args:
        parser: Parser of the command.
        split: Default of `--split`; None for the split `test`, or all episodes of a LeRobotDataset without this split.
        required: Whether `--dataset` is required.
    """
    add = parser.add_argument
    add("--dataset", required=required, help="folder or Hub id: LeRobotDataset, IRASim format or `datasets`")
    add("--cameras", nargs="*", default=[], help="cameras, stacked vertically; left,right joins two horizontally")
    default = split or "test, or all episodes if a LeRobotDataset has no test split"
    add("--split", default=split, help=f"split, or a part of one such as train[90%%:] (default: {default})")
    add("--fps", type=float, help="frame rate, if the dataset does not store it")
    add("--action-column", nargs="*", default=[], help="action columns, concatenated (default: action, actions)")
    add(
        "--state-columns",
        nargs="*",
        default=[],
        help="state columns (default: all of a LeRobotDataset, none of a table)",
    )


def frame_size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Return the values of `--height` and `--width`, to which frames are resized; None without both flags.

    Raises:
        ValueError: If a value is out of range, or only one of them is given.
    """
    check_flag_ranges(arguments, {"height": (1, MAX_SIDE), "width": (1, MAX_SIDE)})
    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("--height and --width must be passed together.")
    return None if arguments.height is None else (arguments.height, arguments.width)


def open_dataset(arguments: argparse.Namespace) -> Any:
    """Open the episodes that the flags of `add_dataset_flags` select.

    Raises:
        ValueError: If a flag is invalid, or the dataset cannot be opened or stores another frame rate.
    """
    from ..data import open_dataset

    check_name("--dataset", arguments.dataset)
    if arguments.split == "":
        raise ValueError("--split must be the name of a split, got an empty name.")
    if arguments.fps is not None and not 0 < arguments.fps < math.inf:
        raise ValueError(f"--fps must be positive, got {arguments.fps:g}.")
    dataset = open_dataset(
        arguments.dataset,
        arguments.cameras or None,
        split=arguments.split,
        fps=arguments.fps,
        action_column=arguments.action_column,
        state_columns=arguments.state_columns,
    )
    if arguments.fps is not None and dataset.fps != arguments.fps:
        raise ValueError(
            f"--fps must be omitted for {arguments.dataset!r}, which stores {dataset.fps:g} fps, got {arguments.fps:g}."
        )
    return dataset
