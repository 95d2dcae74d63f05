"""`irasim data`: convert episodes to a LeRobotDataset, and publish it."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from .dataset import add_dataset_flags, open_dataset
from .files import check_output_folder


def add_parser(subparsers: Any) -> None:
    """Add `data` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "data",
        help="convert episodes to a LeRobotDataset, and publish it",
        description="Convert episodes in any format that train.py reads to a LeRobotDataset v3.0 with a card. --push-to-hub "
        "publishes the dataset. Run the same command again to resume.",
    )
    parser.set_defaults(run=run)
    add_dataset_flags(parser, "train", "skip_broken")
    add = parser.add_argument
    add("--robot-type", default="unknown", help="name of the robot (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder to write")
    add("--push-to-hub", metavar="ORG/NAME", help="Hub repository to which the dataset is pushed")


def run(arguments: argparse.Namespace) -> None:
    """Write a LeRobotDataset with a card, and push it with --push-to-hub."""
    from ..data import publish_lerobot, write_dataset_card, write_lerobot

    output: Path = arguments.output
    check_output_folder(output)
    if output.exists() and Path(arguments.dataset).exists() and output.samefile(arguments.dataset):
        raise ValueError(f"--output must differ from --dataset, got {str(output)!r} for both.")
    if arguments.push_to_hub is not None:
        _check_repo_id(arguments.push_to_hub)
    source = open_dataset(arguments)
    progress = _Progress(len(source), arguments.push_to_hub)
    with closing(progress):
        folder = write_lerobot(
            source,
            output,
            robot_type=arguments.robot_type,
            skip_broken=arguments.skip_broken,
            on_episode=progress.on_episode,
        )
    write_dataset_card(folder, arguments.push_to_hub or str(output))
    print(f"episodes written to {output}: {len(folder)}; skipped: {progress.num_skipped}")
    if arguments.push_to_hub:
        publish_lerobot(folder, arguments.push_to_hub)
        print(f"published as {arguments.push_to_hub}")


def _check_repo_id(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub must be ORG/NAME, got {name!r}: {error}") from error


class _Progress:
    """Progress bar of the episodes; it is shown after all checks, with the first episode.

    Args:
        total: Number of episodes.
        repo_id: Repository to create when the bar is first shown: a failure, such as a missing permission, is then reported before
            most of the work, and bad input creates no repository.
    """

    def __init__(self, total: int, repo_id: str | None) -> None:
        self.num_skipped = 0
        self._total, self._repo_id = total, repo_id
        self._bar: Any = None

    def on_episode(self, number: int, error: str | None) -> None:
        """Count an episode, and report why it was skipped."""
        if self._bar is None:
            self._start()
        self._bar.update()
        if error is not None:
            self.num_skipped += 1
            self._bar.write(f"skipped: {error}")

    def _start(self) -> None:
        from huggingface_hub import HfApi
        from tqdm.auto import tqdm

        if self._repo_id:
            HfApi().create_repo(self._repo_id, repo_type="dataset", exist_ok=True)
        self._bar = tqdm(total=self._total, desc="writing episodes", unit="episode")

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
