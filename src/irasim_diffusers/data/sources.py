"""Open datasets of all supported formats from a folder or the Hub."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from ..json_files import read_json_object
from .episode import EpisodeSource, check_max_episodes
from .hub import HubFiles
from .irasim_release import IRASimFolder
from .lerobot import LeRobotFolder
from .tables import TableEpisodes

TABLE_FILES = (".parquet", ".arrow", ".jsonl")
"""Suffixes of the table files that `datasets.load_dataset` reads from a folder."""


def open_dataset(
    name: str | os.PathLike,
    cameras: Any = None,
    *,
    split: str | None = "train",
    max_episodes: int | None = None,
    fps: float | None = None,
    action_column: str | Sequence[str] | None = None,
    state_columns: Sequence[str] = (),
    revision: str | None = None,
    streaming: bool = False,
) -> EpisodeSource:
    """Open a dataset of any supported format, from a folder or the Hub.

    A folder or Hub repository with `meta/info.json` is a LeRobotDataset, and a folder with `annotation` has the format of the
    IRASim release. All other Hub repositories, folders written by `Dataset.save_to_disk`, and folders of Parquet, Arrow or JSON
    Lines files are tables of `datasets`. Only the requested cameras and episodes of a LeRobotDataset on the Hub are downloaded.
    With `streaming`, only the files that are read are downloaded, and they are deleted afterward.

    Args:
        name: Folder or Hub id.
        cameras: One camera, several stacked cameras, or rows of cameras; None selects the layout stored by `write_lerobot` or the
            only camera, and in a table the column `video`.
        split: Name of the split. For a LeRobotDataset, and for a table that is neither streamed nor from `save_to_disk`, also a
            part of a split such as `"train[:90%]"`. None selects `test`, or all episodes of a LeRobotDataset without it.
        max_episodes: Maximum number of episodes, counted from the first.
        fps: Frames per second, for formats that do not record them.
        action_column: Column or feature of the actions, or several that are concatenated; None selects `action` (LeRobotDataset) or
            `actions` (table), or the only one with a similar name.
        state_columns: Columns or features of the states; empty for all float ones of a LeRobotDataset and none of a table.
        revision: Branch, tag or commit on the Hub.
        streaming: Keep at most one file of vectors and one video file per camera, for data on the Hub that are larger than the
            disk. Only reading episodes in order is then fast.

    Raises:
        ValueError: If `name` is neither a folder nor a Hub id, the folder contains no dataset, the dataset is invalid,
            `max_episodes` is less than 1, a camera, split or column does not exist or is ambiguous, columns are given for the
            IRASim format, or `max_episodes` is None for a streamed table that does not declare its number of rows.
        OSError: If a Hub repository cannot be accessed or downloaded.
    """
    check_max_episodes(max_episodes)
    if not os.fspath(name):
        raise ValueError("`dataset` must be a folder or a Hub id such as org/name, got an empty name.")
    selection = {"action_column": action_column, "state_columns": state_columns}
    options = {"cameras": cameras, "max_episodes": max_episodes, **selection}
    if not Path(name).exists():
        return _open_remote(str(name), split=split, fps=fps, revision=revision, streaming=streaming, **options)
    return _open_folder(Path(name), split=split, fps=fps, **options)


def _open_remote(
    name: str, *, split: str | None, fps: float | None, revision: str | None, streaming: bool, **options: Any
) -> EpisodeSource:
    """Open a dataset of the Hub: a LeRobotDataset if it has `meta/info.json`, otherwise a table."""
    if Path(name).is_absolute() or name.count("/") != 1:
        similar = _similar_folders(Path(name))
        raise ValueError(
            f"`dataset` must be a folder or a Hub id such as org/name, got {name!r}, which is not a folder{similar}."
        )
    try:
        hf_hub_download(name, "meta/info.json", repo_type="dataset", revision=revision)
    except EntryNotFoundError:  # or, offline, not in the cache
        if streaming:
            revision = HfApi().dataset_info(name, revision=revision).sha
        table = _load_table(name, split or "test", revision=revision, streaming=streaming)
        return _table(table, fps=fps, origin=f"{name} at {revision}" if streaming else None, **options)
    if streaming:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns="meta/*"))
        return _lerobot(folder, split=split, remote=HubFiles(name, folder.name), **options)
    folder = _download_lerobot(name, revision=revision, split=split, **options)
    return _lerobot(folder, split=split, **options)


def _open_folder(folder: Path, *, split: str | None, fps: float | None, **options: Any) -> EpisodeSource:
    """Detect the format of a folder and open it."""
    if (folder / "meta" / "info.json").is_file():
        return _lerobot(folder, split=split, **options)
    if (folder / "meta").is_dir() and any((folder / "data").glob("chunk-*")):
        raise ValueError(
            f"{str(folder)!r} must contain 'meta/info.json' like every LeRobotDataset, but it is missing."
        )
    split = split or "test"
    if (folder / "annotation").is_dir():
        if options["action_column"] or options["state_columns"]:
            raise ValueError(
                f"`action_column` (--action_column) and `state_columns` (--state_columns) must be omitted for {str(folder)!r}: "
                "the IRASim format defines its actions and states."
            )
        return IRASimFolder(folder, split, options["cameras"], fps, options["max_episodes"])
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _table(_saved_table(folder, split), fps=fps, **options)
    if any(path.suffix in TABLE_FILES and not path.name.startswith(".") for path in folder.rglob("*")):
        return _table(_load_table(str(folder), split), fps=fps, **options)
    raise ValueError(
        f"{str(folder)!r} contains no supported dataset: 'meta/info.json' (LeRobotDataset), 'annotation' (IRASim), "
        f"'dataset_info.json' (datasets) and table files ({', '.join(TABLE_FILES)}) are missing."
    )


def _load_table(name: str, split: str, **options: Any) -> Any:
    """Load a table from a folder or the Hub with `datasets`."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split, **options)
    except (ValueError, AssertionError, OSError, datasets.exceptions.DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        place = "" if Path(name).is_dir() else f", which is not a folder{_similar_folders(Path(name))}, on the Hub"
        raise ValueError(f"cannot read the split {split!r} of the table {name!r}{place}: {error}{cause}") from error


def _similar_folders(path: Path) -> str:
    """Return a hint for a mistyped path, with a folder of a similar name if there is one."""
    if not path.parent.is_dir():
        return ""
    names = [each.name for each in path.parent.iterdir() if each.name != path.name]  # itself: a broken link
    similar = difflib.get_close_matches(path.name, names, n=1)
    return "".join(f" (did you mean {str(path.parent / name)!r}?)" for name in similar)


def _saved_table(folder: Path, split: str) -> Any:
    """Return a split of a table that was written by `save_to_disk`."""
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"cannot read the table {str(folder)!r}: {error}") from error
    tables = table if isinstance(table, datasets.DatasetDict) else {str(table.split or split).split("[")[0]: table}
    if split not in tables:
        raise ValueError(f"`split` must be one of {sorted(tables)} in {str(folder)!r}, got {split!r}.")
    return tables[split]


def _table(
    table: Any,
    *,
    cameras: Any,
    max_episodes: int | None,
    fps: float | None,
    origin: str | None = None,
    **selection: Any,
) -> TableEpisodes:
    """Open a table; with `origin`, a streamed table."""
    length = None if origin is None else _declared_rows(table, max_episodes)
    if origin is None and max_episodes is not None:
        table = table.select(range(min(max_episodes, len(table))))
    cameras = "video" if cameras is None else cameras
    return TableEpisodes(table, cameras, fps=fps, length=length, origin=origin, **selection)


def _declared_rows(table: Any, max_episodes: int | None) -> int:
    """Return the number of rows to read from a streamed table."""
    known = (table.info.splits or {}).get(str(table.split))
    counts = [count for count in (known.num_examples if known else None, max_episodes) if count is not None]
    if not counts:
        raise ValueError(
            f"`max_episodes` (--max_train_episodes) must be given for {table.info.dataset_name!r}, because its card does "
            "not declare the number of rows; for validation data, omit `streaming` (--streaming) instead."
        )
    return min(counts)


def _lerobot(folder: Path, *, split: str | None, remote: HubFiles | None = None, **options: Any) -> LeRobotFolder:
    """Open a LeRobotDataset; `split` None selects `test`, or all episodes if there is no such split."""
    if split is None and "test" in (read_json_object(folder / "meta" / "info.json").get("splits") or {}):
        split = "test"
    return LeRobotFolder(folder, split=split, remote=remote, **options)


def _download_lerobot(name: str, *, revision: str | None, split: str | None, **options: Any) -> Path:
    """Download the vectors and videos of the requested episodes and cameras of a LeRobotDataset."""
    folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns="meta/*"))
    requested = _lerobot(folder, split=split, **options)
    wanted = [camera for row in requested.cameras for camera in row]
    videos = [pattern.format(key) for key in wanted for pattern in ("videos/{}/*", "videos/*/{}/*")]
    patterns = ["data/*", *videos]
    if len(requested) < len(LeRobotFolder(folder, **options | {"max_episodes": None})):
        patterns = [path.relative_to(folder).as_posix() for path in requested.files]
    return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=["meta/*", *patterns]))
