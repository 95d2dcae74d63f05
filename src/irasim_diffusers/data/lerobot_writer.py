"""Write LeRobotDataset folders, v3.0, without a dependency on lerobot.

Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import temporary_path
from .episode import Episode
from .lerobot import INDEX_FEATURES, VERSION
from .video import write_video

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def write_file(
    root: str | os.PathLike,
    file_index: int,
    episodes: Iterable[Episode],
    *,
    fps: float,
    camera: str,
    tasks: Sequence[str],
    first_episode: int = 0,
    first_frame: int = 0,
) -> None:
    """Write one file's worth of episodes: video, then vectors, then the rows of `meta/episodes` that announce them.

    Where there are none, nothing is written. Files may be written in any order and by several processes. A file counts as
    written once its `meta/episodes` file is there, so an interrupted collection resumes with the first one missing.
    `write_metadata` completes the folder.

    Args:
        root: The data set's folder.
        file_index: Number of the file.
        episodes: Its episodes, of which one at a time is held if they are read as they are asked for.
        fps: Frames per second.
        camera: Feature key of the frames, `observation.image` for example.
        tasks: Tasks of the data set, as given to `write_metadata`; those of an episode are among them when it is read.
        first_episode: Number of the first episode within the data set.
        first_frame: Number of the first frame within the data set.
    """
    root = Path(root)
    place = {"chunk_index": 0, "file_index": file_index}
    columns: dict[str, list[np.ndarray]] = {}
    rows: list[dict[str, Any]] = []

    def frames() -> Iterator[np.ndarray]:
        start = 0
        for episode in episodes:
            number, length = first_episode + len(rows), len(episode)
            numbers = np.arange(length)
            index: dict[str, np.ndarray] = {
                "timestamp": (numbers / fps).astype(np.float32),
                "frame_index": numbers,
                "episode_index": np.full(length, number),
                "index": first_frame + start + numbers,
                "task_index": np.full(length, tasks.index(episode.task)),
            }
            vectors = {"action": episode.actions, **episode.states}
            for key, values in {**vectors, **index}.items():
                columns.setdefault(key, []).append(values)
            statistics = {camera: _image_statistics(episode.frames)}
            statistics |= {key: _statistics(np.asarray(value).reshape(length, -1)) for key, value in vectors.items()}
            rows.append(
                {
                    "episode_index": number,
                    "tasks": [episode.task],
                    "length": length,
                    "dataset_from_index": first_frame + start,
                    "dataset_to_index": first_frame + start + length,
                    "data/chunk_index": 0,
                    "data/file_index": file_index,
                    f"videos/{camera}/chunk_index": 0,
                    f"videos/{camera}/file_index": file_index,
                    f"videos/{camera}/from_timestamp": start / fps,
                    f"videos/{camera}/to_timestamp": (start + length) / fps,
                    "meta/episodes/chunk_index": 0,
                    "meta/episodes/file_index": file_index,
                }
                | {f"stats/{key}/{name}": value for key, stat in statistics.items() for name, value in stat.items()}
            )
            start += length
            yield from map(np.copy, episode.frames)  # a view that is kept would keep the episode
            del episode  # before the next is read

    pictures = frames()
    first = next(pictures, None)
    if first is None:
        return
    write_video(root / VIDEO_PATH.format(video_key=camera, **place), chain([first], pictures), fps, lossless=True)
    _write_table(root / DATA_PATH.format(**place), {key: _column(key, parts) for key, parts in columns.items()})
    with temporary_path(root / EPISODES_PATH.format(**place)) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial)


def is_written(root: str | os.PathLike, file_index: int) -> bool:
    """Whether `write_file` has completed file `file_index`."""
    return (Path(root) / EPISODES_PATH.format(chunk_index=0, file_index=file_index)).is_file()


def write_metadata(
    root: str | os.PathLike,
    *,
    fps: float,
    camera: str,
    frame_size: tuple[int, int],
    names: dict[str, list[str]],
    tasks: Sequence[str],
    robot_type: str,
) -> None:
    """Complete a folder whose files were written by `write_file`: info.json, stats.json and tasks.parquet.

    Args:
        root: The data set's folder.
        fps: Frames per second.
        camera: Feature key of the frames.
        frame_size: Height and width.
        names: Components of each vector feature, `{"action": ["x", "y"]}` for example.
        tasks: Task strings, by task index.
        robot_type: Name of the robot.
    """
    root = Path(root)
    files = sorted(root.glob("meta/episodes/chunk-*/file-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    height, width = frame_size
    video_info = {"video.fps": fps, "video.codec": "h264", "video.pix_fmt": "gbrp", "has_audio": False}
    features: dict[str, Any] = {
        camera: {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": video_info | {"video.height": height, "video.width": width, "video.channels": 3},
        }
    }
    features |= {key: {"dtype": "float32", "shape": [len(value)], "names": value} for key, value in names.items()}
    features |= {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in INDEX_FEATURES.items()}
    info = {
        "codebase_version": VERSION,
        "robot_type": robot_type,
        "total_episodes": len(rows),
        "total_frames": sum(row["length"] for row in rows),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }
    statistics = {key: _pool([_row_statistics(row, key) for row in rows]) for key in [camera, *names]}
    with temporary_path(root / "meta" / "tasks.parquet") as partial:
        pq.write_table(_tasks_table(tasks), partial)
    for name, content in (("stats.json", statistics), ("info.json", info)):
        with temporary_path(root / "meta" / name) as partial:
            partial.write_text(json.dumps(content, indent=4))


def _tasks_table(tasks: Sequence[str]) -> pa.Table:
    """Task indices with the task strings as the pandas index, as LeRobot reads them."""

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


def _column(key: str, parts: list[np.ndarray]) -> pa.Array:
    values = np.concatenate(parts)
    if key in INDEX_FEATURES:
        return pa.array(values.astype(INDEX_FEATURES[key]))
    values = values.astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _write_table(path: Path, columns: dict[str, pa.Array]) -> None:
    with temporary_path(path) as partial:
        pq.write_table(pa.table(columns), partial)


def _statistics(values: np.ndarray) -> dict[str, list]:
    """Statistics over the rows of (N, D)."""
    values = values.astype(np.float64)
    result = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
    }
    result |= {name: np.quantile(values, level, axis=0) for name, level in QUANTILES.items()}
    return {name: value.tolist() for name, value in result.items()}


def _image_statistics(frames: np.ndarray) -> dict[str, list]:
    """Statistics in [0, 1] over every tenth frame, nested (3, 1, 1) as LeRobot keeps them."""
    sample = frames[::10]
    result = _statistics(sample.reshape(-1, 3) / 255.0)
    result["count"] = [len(sample)]
    return {name: value if name == "count" else [[[v]] for v in value] for name, value in result.items()}


def _row_statistics(row: dict[str, Any], key: str) -> dict[str, np.ndarray]:
    prefix = f"stats/{key}/"
    return {name[len(prefix) :]: np.array(value) for name, value in row.items() if name.startswith(prefix)}


def _pool(parts: list[dict[str, np.ndarray]]) -> dict[str, list]:
    """Pool the statistics of several episodes; quantiles are weighted means, as in LeRobot."""
    count = np.array([part["count"][0] for part in parts], dtype=np.float64)
    weight = count / count.sum()

    def average(values: np.ndarray) -> np.ndarray:
        return np.tensordot(weight, values, axes=1)

    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0] if name != "count"}
    mean = average(stacked["mean"])
    variance = average(stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)
    result = {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "mean": mean, "std": np.sqrt(variance)}
    result |= {name: average(stacked[name]) for name in QUANTILES}
    return {name: value.tolist() for name, value in result.items()} | {"count": [int(count.sum())]}
