"""`irasim data`: write episodes as a LeRobotDataset, and publish it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .dataset import add_dataset_flags, open_dataset


def add_parser(subparsers: Any) -> None:
    """Add `data` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "data",
        help="write clips as a LeRobotDataset, or publish them",
        description="Write clips of any format that train.py reads as a LeRobotDataset v3.0 with a card, and publish it with "
        "--push-to-hub. The same command again resumes.",
    )
    parser.set_defaults(run=run)
    add_dataset_flags(parser, "train")
    add = parser.add_argument
    add("--skip-broken", action="store_true", help="leave out episodes that cannot be read, and name them")
    add("--robot-type", default="unknown", help="name of the robot")
    add("--output", type=Path, required=True, help="folder to write")
    add("--push-to-hub", metavar="ORG/NAME", help="publish the folder as this data set")


def run(arguments: argparse.Namespace) -> None:
    """Read the episodes, write a LeRobotDataset with a card, and publish it if asked to."""
    from huggingface_hub import HfApi
    from tqdm.auto import tqdm

    from ..data import publish_lerobot, write_dataset_card, write_lerobot

    output: Path = arguments.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {str(output)!r}.")
    source = open_dataset(arguments)
    if arguments.push_to_hub:  # before hours of work
        HfApi().create_repo(arguments.push_to_hub, repo_type="dataset", exist_ok=True)
    skipped: list[str] = []
    with tqdm(total=len(source), desc="writing clips", unit="episode") as bar:

        def on_episode(_: int, error: str | None) -> None:
            bar.update()
            if error is not None:
                skipped.append(error)
                bar.write(f"skipped: {error}")

        folder = write_lerobot(
            source,
            output,
            robot_type=arguments.robot_type,
            skip_broken=arguments.skip_broken,
            on_episode=on_episode,
        )
    tiled = sum(len(row) for row in source.cameras) > 1
    names = "; ".join(", ".join(row) for row in source.cameras)
    write_dataset_card(
        folder, arguments.push_to_hub or output.name, f", the cameras tiled by rows: {names}" if tiled else ""
    )
    print(f"{len(folder)} episodes written to {output}, {len(skipped)} skipped")
    if arguments.push_to_hub:
        publish_lerobot(folder, arguments.push_to_hub)
        print(f"published as {arguments.push_to_hub}")
