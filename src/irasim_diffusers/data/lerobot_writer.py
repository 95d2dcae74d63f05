"""Write LeRobotDataset folders, v3.0, without a dependency on lerobot.

Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..actions import DERIVATIONS
from ..files import temporary_path
from .episode import CameraLayout, Episode
from .lerobot import INDEX_FEATURES, VERSION
from .lerobot_metadata import OWN_ENTRY
from .lerobot_statistics import image_statistics, pool, vector_statistics
from .video import video_writer

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
Regions: TypeAlias = Mapping[str, tuple[slice, slice]]
"""Rows and columns of each camera's image in a tiled frame, by feature key."""


def write_file(
    root: str | os.PathLike,
    file_index: int,
    episodes: Iterable[Episode],
    *,
    fps: float,
    camera: str | Regions,
    tasks: Sequence[str],
    first_episode: int = 0,
    first_frame: int = 0,
) -> None:
    """Write one file of episodes: the videos, then the vectors, then the rows of `meta/episodes`.

    Files may be written in any order and by several processes. A file counts as written once its `meta/episodes` file
    exists, so that an interrupted run resumes at the first missing file. Nothing is written if there are no episodes.
    `write_metadata` completes the folder.

    Args:
        root: The folder of the dataset.
        file_index: Index of the file.
        episodes: Episodes of the file. Only one is in memory at a time if the iterable reads them on demand. Bool, integer and
            string (dtype object) states keep their type; all other states become float32.
        fps: Frames per second.
        camera: Feature key of the frames, for example `observation.image`; or the regions of several cameras in the frames,
            which are written as separate features.
        tasks: Tasks of the dataset, as given to `write_metadata`. The iterable may append the task of an episode to
            this list before it yields the episode.
        first_episode: Index of the file's first episode in the dataset.
        first_frame: Index of the file's first frame in the dataset.

    Raises:
        ValueError: If a task is missing in `tasks`, frames or vectors differ in size, or vectors do not have one row per frame.
    """
    root = Path(root)
    regions = _regions(camera)
    columns: dict[str, list[np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    length = 0
    with ExitStack() as stack:
        append: dict[str, Callable[[np.ndarray], None]] = {}
        for episode in episodes:
            if not append:  # open the videos with the first episode: without episodes, no file is written
                paths = {key: _path(root, VIDEO_PATH, file_index, video_key=key) for key in regions}
                append = {key: stack.enter_context(video_writer(path, fps, True)) for key, path in paths.items()}
            number = first_episode + len(rows)
            vectors = _vectors(episode, fps, tasks, number, first_frame + length)
            for key, values in vectors.items():
                columns.setdefault(key, []).append(values)
            statistics = _write_frames(episode.frames, regions, append)
            numeric = {key: values for key, values in vectors.items() if values.dtype != object}
            statistics |= {key: vector_statistics(values) for key, values in numeric.items()}
            row = _row(episode, number, first_frame + length)
            rows.append(row | _places(regions, file_index, length / fps, (length + len(episode)) / fps))
            rows[-1] |= {f"stats/{key}/{name}": v for key, stat in statistics.items() for name, v in stat.items()}
            length += len(episode)
            del episode  # before the next one is read
    if rows:
        table = pa.table({key: _column(parts) for key, parts in columns.items()})
        _write_table(_path(root, DATA_PATH, file_index), table)
        _write_table(_path(root, EPISODES_PATH, file_index), pa.Table.from_pylist(rows))


def count_written(root: str | os.PathLike, file_index: int) -> int:
    """Return the number of episodes in a file of `write_file`; 0 if it or a video is incomplete.

    The videos are read, but not decoded: the header of a truncated video may be intact.
    """
    try:
        table = pq.read_table(_path(Path(root), EPISODES_PATH, file_index))
        for key in (
            name for name in table.column_names if name.startswith("videos/") and name.endswith("/file_index")
        ):
            video = _path(Path(root), VIDEO_PATH, file_index, video_key=key.split("/")[1])
            with av.open(str(video)) as container:
                if sum(packet.size > 0 for packet in container.demux(video=0)) != sum(table["length"].to_pylist()):
                    return 0
        return table.num_rows
    except (OSError, pa.ArrowInvalid, av.error.FFmpegError):  # missing, or damaged by a crash
        return 0


def is_written(root: str | os.PathLike, file_index: int) -> bool:
    """Return whether `write_file` has completed a file."""
    return count_written(root, file_index) > 0


def write_metadata(
    root: str | os.PathLike,
    *,
    fps: float,
    camera: str | Regions,
    frame_size: tuple[int, int],
    names: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    robot_type: str,
    action_derivation: str = "recorded",
    action_units: Sequence[str | None] | None = None,
) -> None:
    """Write info.json, stats.json and tasks.parquet for the files that `write_file` has written.

    Args:
        root: The folder of the dataset.
        fps: Frames per second.
        camera: Feature key of the frames, or the regions of several cameras, as given to `write_file`.
        frame_size: Height and width of the frames.
        names: Component names of vector features, for example `{"action": ["x", "y"]}`; other features have none.
        tasks: Tasks of the dataset, in the order of their indices.
        robot_type: Name of the robot.
        action_derivation: How the actions are computed from states, one of `actions.DERIVATIONS`.
        action_units: Units of the action components, None where they are unknown.

    Raises:
        ValueError: If tasks repeat, the derivation is unknown, or the folder has no episode.
    """
    root, regions = Path(root), _regions(camera)
    if repeated := [task for number, task in enumerate(tasks) if task in tasks[:number]]:
        raise ValueError(f"`tasks` must be unique, got {repeated[0]!r} more than once.")
    if action_derivation not in DERIVATIONS:
        raise ValueError(f"`action_derivation` must be one of {DERIVATIONS}, got {action_derivation!r}.")
    files = sorted(root.glob("meta/episodes/chunk-*/file-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    if not rows:
        raise ValueError(f"{str(root)!r} has no episode: call `write_file` first.")
    cameras = {key: _picture_size(region, frame_size) for key, region in regions.items()}
    features = {key: _camera_feature(size, fps) for key, size in cameras.items()}
    features |= _vector_features(root, names)
    own = _own_entry(regions, action_derivation, action_units)
    if own:  # stored inside a feature, because LeRobot's tools keep features when they rewrite info.json
        features["action"][OWN_ENTRY] = own
    info = _info(rows, tasks, robot_type, fps, features)
    keys = [key for key in features if all(f"stats/{key}/mean" in row for row in rows)]
    statistics = {key: pool([_row_statistics(row, key) for row in rows]) for key in keys}
    _write_table(root / "meta" / "tasks.parquet", _tasks_table(tasks))
    for name, content in (("stats.json", statistics), ("info.json", info)):
        with temporary_path(root / "meta" / name) as partial:
            partial.write_text(json.dumps(content, indent=4), encoding="utf-8")


def tile_regions(layout: CameraLayout, sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[slice, slice]]:
    """Return the rows and columns of each camera's image in the frames that `tile` returns.

    Args:
        layout: The cameras as they are tiled.
        sizes: Height and width of each camera's images.
    """
    regions: dict[str, tuple[slice, slice]] = {}
    top = 0
    for row in layout:
        left, height = 0, sizes[row[0]][0]
        for camera in row:
            width = sizes[camera][1]
            regions[camera] = slice(top, top + height), slice(left, left + width)
            left += width
        top += height
    return regions


def region_layout(regions: Regions) -> CameraLayout:
    """Return the layout of tiled cameras; the inverse of `tile_regions`."""
    rows: dict[int, list[str]] = {}
    for key, region in sorted(regions.items(), key=lambda item: [part.start for part in item[1]]):
        rows.setdefault(region[0].start, []).append(key)
    return tuple(tuple(row) for row in rows.values())


def _own_entry(regions: Regions, derivation: str, units: Sequence[str | None] | None) -> dict[str, Any]:
    """Return what LeRobot does not store: derivation and units of the actions, and the camera layout."""
    own: dict[str, Any] = {}
    if derivation != "recorded":
        own["action_derivation"] = derivation
    if units is not None and any(unit is not None for unit in units):
        own["action_units"] = list(units)
    if len(regions) > 1:
        own["cameras"] = region_layout(regions)
    return own


def _info(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], robot_type: str, fps: float, features: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of info.json."""
    return {
        "codebase_version": VERSION,
        "robot_type": robot_type,
        "total_episodes": len(rows),
        "total_frames": sum(row["length"] for row in rows),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(fps) if fps == int(fps) else fps,
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _regions(camera: str | Regions) -> Regions:
    return {camera: (slice(None), slice(None))} if isinstance(camera, str) else camera


def _path(root: Path, template: str, file_index: int, **names: str) -> Path:
    return root / template.format(chunk_index=0, file_index=file_index, **names)


def _vectors(
    episode: Episode, fps: float, tasks: Sequence[str], number: int, first_frame: int
) -> dict[str, np.ndarray]:
    """Return all vector features (T, D) of an episode, and LeRobot's index features."""
    length = len(episode)
    if episode.task not in tasks:
        raise ValueError(
            f"`tasks` must contain the task of every episode, got {len(tasks)} tasks without {episode.task!r}."
        )
    vectors = {}
    for key, values in {"action": episode.actions, **episode.states}.items():
        if len(values) != length:
            raise ValueError(f"{key!r} must have {length} rows, one per frame, got {len(values)}.")
        kept = values if values.dtype.kind in "biuO" else values.astype(np.float32)
        vectors[key] = kept.reshape(length, -1)
    frames = np.arange(length)
    index = {
        "timestamp": frames / fps,
        "frame_index": frames,
        "episode_index": np.full(length, number),
        "index": first_frame + frames,
        "task_index": np.full(length, tasks.index(episode.task)),
    }
    return vectors | {key: value.astype(INDEX_FEATURES[key]).reshape(-1, 1) for key, value in index.items()}


def _write_frames(
    frames: np.ndarray, regions: Regions, append: Mapping[str, Callable[[np.ndarray], None]]
) -> dict[str, dict[str, list]]:
    """Append frames (T, H, W, 3) to the videos of all cameras; return the statistics of each camera."""
    statistics = {}
    for key, (rows, columns) in regions.items():
        pictures = frames[:, rows, columns]
        for picture in pictures:
            append[key](picture)
        statistics[key] = image_statistics(pictures)
    return statistics


def _row(episode: Episode, number: int, first_frame: int) -> dict[str, Any]:
    """Return the row of `meta/episodes` without statistics or location."""
    return {
        "episode_index": number,
        "tasks": [episode.task],
        "length": len(episode),
        "dataset_from_index": first_frame,
        "dataset_to_index": first_frame + len(episode),
    }


def _places(regions: Regions, file_index: int, begin: float, end: float) -> dict[str, Any]:
    """Return the location columns of `meta/episodes`; times in seconds."""
    places: dict[str, Any] = {"data/chunk_index": 0, "data/file_index": file_index}
    for key in regions:
        places[f"videos/{key}/chunk_index"] = 0
        places[f"videos/{key}/file_index"] = file_index
        places[f"videos/{key}/from_timestamp"] = begin
        places[f"videos/{key}/to_timestamp"] = end
    return places | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": file_index}


def _picture_size(region: tuple[slice, slice], frame_size: tuple[int, int]) -> tuple[int, int]:
    height, width = (len(range(*part.indices(size))) for part, size in zip(region, frame_size, strict=True))
    return height, width


def _camera_feature(size: tuple[int, int], fps: float) -> dict[str, Any]:
    height, width = size
    video = {"video.fps": fps, "video.codec": "h264", "video.pix_fmt": "gbrp", "has_audio": False}
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": video | {"video.height": height, "video.width": width, "video.channels": 3},
    }


def _vector_features(root: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the entries of info.json for the columns of the data files."""
    features = {}
    for field in pq.read_schema(min(root.glob("data/chunk-*/file-*.parquet"))):
        is_list = pa.types.is_fixed_size_list(field.type)
        element, width = (field.type.value_type, field.type.list_size) if is_list else (field.type, 1)
        components = list(names[field.name]) if field.name in names else None
        dtype = "string" if pa.types.is_string(element) else np.dtype(element.to_pandas_dtype()).name
        features[field.name] = {"dtype": dtype, "shape": [width], "names": components}
    return features


def _column(parts: Sequence[np.ndarray]) -> pa.Array:
    """Return a column of lists, or of numbers if the width is 1, as LeRobot expects."""
    values = np.concatenate(parts)
    if values.shape[1] == 1:
        return pa.array(values[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _write_table(path: Path, table: pa.Table) -> None:
    with temporary_path(path) as partial:
        pq.write_table(table, partial)


def _row_statistics(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    prefix = f"stats/{key}/"
    return {name[len(prefix) :]: value for name, value in row.items() if name.startswith(prefix)}


def _tasks_table(tasks: Sequence[str]) -> pa.Table:
    """Return the task indices with the task strings as the pandas index, as LeRobot reads them."""

    def column(name: str | None, field_name: str, pandas_type: str, numpy_type: str) -> dict[str, Any]:
        types = {"pandas_type": pandas_type, "numpy_type": numpy_type, "metadata": None}
        return {"name": name, "field_name": field_name} | types

    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [column(None, "None", "unicode", "object")],
        "columns": [
            column("task_index", "task_index", "int64", "int64"),
            column(None, "__index_level_0__", "unicode", "object"),
        ],
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "__index_level_0__": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
