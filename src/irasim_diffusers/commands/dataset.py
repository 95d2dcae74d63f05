"""Flags that select recorded episodes, shared by the commands that read them."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin

from ..data_arguments import MAX_SIDE, EpisodeArguments
from .files import check_flag_ranges, check_name

OPENED = ("cameras", "split", "fps", "action_column", "state_columns")
"""Fields of `EpisodeArguments` that `open_dataset` reads."""


def add_dataset_flags(parser: argparse.ArgumentParser, split: str | None, *names: str, required: bool = True) -> None:
    """Add `--dataset` and flags of `EpisodeArguments`: those that `open_dataset` reads, and `names`.

    Args:
        parser: Parser of the command.
        split: Default of `--split`; None for the split `test`, or all episodes of a LeRobotDataset without this split.
        names: Names of the other fields.
        required: Whether `--dataset` is required.
    """
    dataset = "folder or Hub id: LeRobotDataset, table of `datasets`, or (folder only) IRASim format"
    parser.add_argument("--dataset", required=required, help=dataset)
    for each in fields(EpisodeArguments):
        if each.name not in (*OPENED, *names):
            continue
        default = each.default if each.default_factory is MISSING else each.default_factory()
        shown = default
        if each.name == "split":
            default, shown = split, split or "test, or all episodes if a LeRobotDataset has no test split"
        kind = (*get_args(each.type), each.type)[0]  # int for `int | None`, str for `list[str]`
        options: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        if get_origin(each.type) is list:
            options["nargs"] = "*"
        text = each.metadata["help"] + (f" (default: {shown})" if shown else "")
        parser.add_argument(f"--{each.name.replace('_', '-')}", default=default, help=text, **options)


def frame_size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Return `--height` and `--width`, to which frames are resized; None if neither is given.

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
        OSError: If the dataset cannot be downloaded.
    """
    from ..data import open_dataset

    check_name("--dataset", arguments.dataset)
    if arguments.split == "":
        raise ValueError("--split must be the name of a split, got an empty name.")
    if arguments.fps is not None and not 0 < arguments.fps < math.inf:
        raise ValueError(f"--fps must be positive and finite, got {arguments.fps:g}.")
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
