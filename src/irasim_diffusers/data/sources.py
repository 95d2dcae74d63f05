"""Any data set by its folder or Hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from .episode import EpisodeSource, camera_layout
from .hub import HubFiles
from .irasim_release import IRASimFolder
from .lerobot import LeRobotFolder
from .tables import TableEpisodes


def open_dataset(
    name: str | os.PathLike,
    cameras: Any = None,
    *,
    split: str | None = "train",
    max_episodes: int | None = None,
    fps: float | None = None,
    action_column: str = "actions",
    state_columns: Sequence[str] = (),
    revision: str | None = None,
    streaming: bool = False,
) -> EpisodeSource:
    """Open a data set of any form that is read here, from a folder or the Hub.

    A folder with `meta/info.json` is a LeRobotDataset, one with `annotation` is of IRASim's release format, one that
    `datasets` has saved, or a Hub repository of another form, is a table. Of a LeRobotDataset on the Hub only the cameras
    and first episodes asked for are downloaded; with `streaming` only what is read, which is deleted when other files are.

    Args:
        name: Folder or Hub id.
        cameras: One camera, several that are stacked, or rows of them; None takes the only one.
        split: As it is called there; of a LeRobotDataset and of a table on the Hub also a part of one, `"train[:90%]"`. None, to
            evaluate: `test`, or all episodes of a LeRobotDataset without one.
        max_episodes: Use only the first that many episodes.
        fps: Frames a second, for formats that do not record them.
        action_column: For tables.
        state_columns: For tables.
        revision: Branch, tag or commit on the Hub.
        streaming: For data on the Hub that are larger than this disk: keep no more than one file of each camera. Episodes are
            quick to read in order.

    Raises:
        ValueError: If the folder holds no data set, or a camera, split or column does not exist, or a table to be streamed
            does not say how many rows it has.
    """
    folder = Path(name)
    if not folder.exists():
        if Path(name).is_absolute() or str(name).count("/") != 1:
            raise ValueError(
                f"`dataset` must be a folder or a Hub id like org/name, got {str(name)!r}, which is no folder."
            )
        try:
            info = hf_hub_download(str(name), "meta/info.json", repo_type="dataset", revision=revision)
        except EntryNotFoundError:  # or, offline, not in the cache
            import datasets

            if streaming:
                revision = HfApi().dataset_info(str(name), revision=revision).sha
            table = datasets.load_dataset(str(name), split=split or "test", revision=revision, streaming=streaming)
            origin = f"{name} at {revision}" if streaming else None
            return _table(table, cameras, max_episodes, fps, action_column, state_columns, origin)
        if streaming:
            folder = Path(
                snapshot_download(str(name), repo_type="dataset", revision=revision, allow_patterns="meta/*")
            )
            return _lerobot(folder, cameras, max_episodes, split, HubFiles(str(name), folder.name))
        folder = _download_lerobot(str(name), Path(info), cameras, max_episodes, revision, split)
    if (folder / "meta" / "info.json").is_file():
        return _lerobot(folder, cameras, max_episodes, split)
    split = split or "test"
    if (folder / "annotation").is_dir():
        return IRASimFolder(folder, split, cameras, fps, max_episodes)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        import datasets

        table = datasets.load_from_disk(str(folder))
        tables = table if isinstance(table, datasets.DatasetDict) else {str(table.split or split).split("[")[0]: table}
        if split not in tables:
            raise ValueError(
                f"`split` must be one of {sorted(tables)} in {str(folder)!r}, got {split!r} (--split, --validation_split)."
            )
        table = tables[split]
        return _table(table, cameras, max_episodes, fps, action_column, state_columns)
    raise ValueError(
        f"{str(folder)!r} holds no data set that is read here: 'meta/info.json' (LeRobotDataset), 'annotation' (IRASim) and "
        "'dataset_info.json' (datasets) are missing."
    )


def _table(
    table: Any,
    cameras: Any,
    max_episodes: int | None,
    fps: float | None,
    action_column: str,
    state_columns: Sequence[str],
    origin: str | None = None,
) -> TableEpisodes:
    """A table, or a stream of one from an `origin`."""
    length = None if origin is None else _announced_rows(table, max_episodes)
    if origin is None and max_episodes is not None:
        table = table.select(range(min(max_episodes, len(table))))
    cameras = "video" if cameras is None else cameras
    return TableEpisodes(table, cameras, action_column, state_columns, fps, length, origin)


def _announced_rows(table: Any, max_episodes: int | None) -> int:
    """Number of rows of a stream to read."""
    known = (table.info.splits or {}).get(str(table.split))
    counts = [count for count in (known.num_examples if known else None, max_episodes) if count is not None]
    if not counts:
        raise ValueError(
            f"`max_episodes` (--max_train_episodes) must be given for {table.info.dataset_name!r}, whose card does not say how "
            "many rows it has."
        )
    return min(counts)


def _lerobot(
    folder: Path, cameras: Any, max_episodes: int | None, split: str | None, remote: HubFiles | None = None
) -> LeRobotFolder:
    """A LeRobotDataset; without a split `test`, or all of it where there is no such split."""
    if split is None and "test" in json.loads((folder / "meta" / "info.json").read_text()).get("splits", {}):
        split = "test"
    return LeRobotFolder(folder, cameras, max_episodes, remote, split)


def _download_lerobot(
    name: str, info: Path, cameras: Any, max_episodes: int | None, revision: str | None, split: str | None
) -> Path:
    """What is needed of a LeRobotDataset on the Hub: vectors and videos of the episodes and cameras asked for."""
    features = json.loads(info.read_text())["features"]
    known = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
    wanted = known if cameras is None else [camera for row in camera_layout(cameras) for camera in row]
    if cameras is None and len(known) != 1:
        raise ValueError(f"`cameras` must name one or more of {known} in {name!r}.")
    videos = [pattern.format(key) for key in wanted for pattern in ("videos/{}/*", "videos/*/{}/*")]
    patterns = ["data/*", *videos]
    folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns="meta/*"))
    wanted_episodes = _lerobot(folder, cameras, max_episodes, split)
    if len(wanted_episodes) < len(LeRobotFolder(folder, cameras)):
        patterns = [path.relative_to(folder).as_posix() for path in wanted_episodes.files]
    return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=["meta/*", *patterns]))
