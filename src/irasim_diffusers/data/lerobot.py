"""LeRobotDataset folders, v3.0 and v2.1 read and v3.0 written, without a dependency on lerobot.

Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3. In v3.0 many episodes share one parquet file (vectors, a
row a frame) and one mp4 file for each camera; `meta/episodes` says where each episode lies in them. In v2.1 every episode
has files of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import temporary_path
from .episode import Episode, InOrder, camera_layout, sizes_digest, tile, window_slice
from .hub import HubFiles
from .video import read_frames, write_video

VERSION = "v3.0"
READABLE_VERSIONS = (VERSION, "v2.1")
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@dataclass(frozen=True)
class LeRobotFolder(InOrder):
    """A LeRobotDataset folder, v3.0 or v2.1, with video or image features.

    Args:
        root: The folder that holds `meta`, `data` and, for video features, `videos`.
        cameras: Feature key of the camera, several that are stacked, or rows of them; None takes the only one. After
            construction the layout, a tuple of rows.
        max_episodes: Use only the first that many episodes.
        remote: Where all but `meta` is, if not in the folder.
        split: A split that `info.json` names, or a part of one as in `datasets`, `"train[:90%]"`; None for all episodes.

    Raises:
        ValueError: If the folder is no LeRobotDataset of these versions, a camera is missing or ambiguous, or there is no such
            split.
    """

    root: Path
    cameras: Any = None
    max_episodes: int | None = None
    remote: HubFiles | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        info_path = self.root / "meta" / "info.json"
        if not info_path.is_file():
            raise ValueError(f"{self.name!r} is no LeRobotDataset folder: {str(info_path)!r} is missing.")
        version = self.info.get("codebase_version")
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"{self.name!r} is a LeRobotDataset {version}; {' and '.join(READABLE_VERSIONS)} are read: convert it with "
                "LeRobot's own scripts."
            )
        known = [key for key, feature in self.info["features"].items() if feature["dtype"] in ("video", "image")]
        if self.cameras is None and len(known) != 1:
            raise ValueError(f"`cameras` must name one or more of {known} in {self.name!r}.")
        layout = camera_layout(known[0] if self.cameras is None else self.cameras)
        for key in [key for row in layout for key in row]:
            if key not in known:
                raise ValueError(f"`cameras` must be among {known} in {self.name!r}, got {key!r}.")
        object.__setattr__(self, "cameras", layout)
        if self.split is not None and not self.rows:
            raise ValueError(f"`split` {self.split!r} has no episodes in {self.name!r}.")

    @property
    def name(self) -> str:
        """The folder, or the name on the Hub."""
        return str(self.root) if self.remote is None else self.remote.repo_id

    @cached_property
    def info(self) -> dict[str, Any]:
        """`meta/info.json`."""
        return json.loads((self.root / "meta" / "info.json").read_text())

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.info["fps"]

    @property
    def identity(self) -> dict[str, Any]:
        """Cameras, `info.json`, and a hash of `meta/episodes*` and of the files' names and sizes, or name and commit."""
        shared = {"cameras": self.cameras, "info": self.info, "episodes": len(self)}
        if self.rows != self._all_rows[: len(self)]:
            shared["numbers"] = [row["episode_index"] for row in self.rows]
        if self.remote is not None:
            return shared | {"root": self.remote.repo_id, "files": self.remote.revision}
        described = hashlib.sha256()
        for path in sorted(self.root.glob("meta/episodes*")):
            for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
                described.update(file.read_bytes())
        return shared | {"described": described.hexdigest(), "files": sizes_digest(self.root, self.files)}

    @property
    def files(self) -> list[Path]:
        """The files that are read for these episodes and cameras, beside `info.json`."""
        keys = [key for row in self.cameras for key in row if self.info["features"][key]["dtype"] == "video"]
        files = set(self._episode_files)
        for row in self.rows:
            with suppress(ValueError):  # broken episodes are named when their turn comes
                files.add(self._path(row))
                files |= {self._path(row, key) for key in keys}
        return sorted(files)

    @property
    def _episode_files(self) -> list[Path]:
        if self.info["codebase_version"] == VERSION:
            return sorted(self.root.glob("meta/episodes/chunk-*/file-*.parquet"))
        return [path for path in (self.root / "meta" / "episodes.jsonl",) if path.is_file()]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each episode, in order, without its statistics: its number, length, tasks, and place in files."""
        rows = self._all_rows
        if self.split is not None:
            rows = [rows[number] for part in self._parts(self.split) for number in part]
        return rows[: self.max_episodes]

    def _parts(self, split: str) -> list[range]:
        """Places of a split's episodes among all."""
        from datasets import ReadInstruction

        every = range(len(self._all_rows))
        named = {
            name: every[slice(*map(int, bounds.split(":")))]
            for name, bounds in self.info.get("splits", {"train": f"0:{len(every)}"}).items()
        }
        try:
            parts = ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in named.items()})
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"`split` must be one of {sorted(named)} in {self.name!r}, or a part as 'train[:90%]' or 'train[90%:]', got "
                f"{split!r}."
            ) from error
        return [named[part.splitname][part.from_ : part.to] for part in parts]

    @cached_property
    def _all_rows(self) -> list[dict[str, Any]]:
        """The rows of all splits."""
        rows: list[dict[str, Any]] = []
        for file in self._episode_files:
            if file.suffix == ".parquet":
                names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
                rows += pq.read_table(file, columns=names).to_pylist()
            else:
                rows += [json.loads(line) for line in file.read_text().splitlines()]
        if not rows:
            raise ValueError(f"{self.name!r} has no episode in its 'meta' folder.")
        return sorted(rows, key=lambda row: row["episode_index"])

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.rows)

    def __getitem__(self, number: int) -> Episode:
        """One episode; only its part of the videos is decoded.

        Raises:
            ValueError: If a video is unreadable or not as long as the episode, a camera is missing, or vectors are missing
                or not finite.
        """
        return self.window(number, 0)

    def window(self, number: int, start: int, length: int | None = None) -> Episode:
        """Frames of an episode from frame `start` on, with what goes with them; no others are decoded in vain.

        Raises:
            ValueError: As for the episode, or if the window does not lie within it.
        """
        row = self.rows[number]
        vectors = self.vectors(number)
        try:
            part = window_slice(start, length, row["length"])
            views = {key: self._frames(row, key, part) for rows in self.cameras for key in rows}
            frames = tile(self.cameras, views)
        except ValueError as error:
            raise ValueError(f"episode {row['episode_index']} of {self.name!r}: {error}") from error
        vectors = {key: value[part] for key, value in vectors.items()}
        return Episode(frames, vectors.pop("action"), vectors, (row.get("tasks") or [""])[0])

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """All vector features (T, D) of one episode, float32, `action` among them."""
        row = self.rows[number]
        keys = [
            key
            for key, feature in self.info["features"].items()
            if feature["dtype"] in ("float32", "float64") and key not in INDEX_FEATURES and len(feature["shape"]) == 1
        ]
        if "action" not in keys:
            raise ValueError(f"{self.name!r} has no feature 'action' of floats; it has {keys}.")
        try:
            table, length = self._rows(row, keys), _entry(row, "length")
            if len(table) != length:
                raise ValueError(f"{length} frames announced, {len(table)} rows found in {str(self._path(row))!r}.")
            vectors = {key: self._matrix(row, key, table[key]) for key in keys}
            if not np.isfinite(vectors["action"]).all():
                frame = int(np.nonzero(~np.isfinite(vectors["action"]).all(axis=1))[0][0])
                raise ValueError(f"the action at frame {frame} is {vectors['action'][frame].tolist()}.")
        except ValueError as error:
            raise ValueError(f"episode {row['episode_index']} of {self.name!r}: {error}") from error
        return vectors

    def component_names(self, key: str) -> list[str] | None:
        """Names of the components of a vector feature; LeRobot knows lists, and lists under a heading."""
        feature = self.info["features"][key]
        names = feature.get("names")
        if isinstance(names, dict):
            names = next(iter(names.values()))
        return list(names) if isinstance(names, (list, tuple)) and len(names) == feature["shape"][0] else None

    def _frames(self, row: dict[str, Any], key: str, part: slice) -> np.ndarray:
        if self.info["features"][key]["dtype"] == "image":
            only = [("episode_index", "=", row["episode_index"])]
            pictures = _read_table(self._file(row), columns=[key], filters=only)[key].to_pylist()[part]
            for frame, picture in enumerate(pictures, part.start):
                if not (picture and (picture.get("bytes") or picture.get("path"))):
                    raise ValueError(f"{str(self._path(row))!r} has no picture {key!r} at frame {frame}.")
            return np.stack([_decode_image(picture, self.root) for picture in pictures])
        shared = self.info["codebase_version"] == VERSION
        first = 0
        if shared:  # the frames of the next episode follow in the same file
            begin, end = (_entry(row, f"videos/{key}/{name}_timestamp") for name in ("from", "to"))
            first, found = round(begin * self.fps), round((end - begin) * self.fps)
            if found < row["length"]:
                raise ValueError(f"{row['length']} frames announced, {found} found in {str(self._path(row, key))!r}.")
        last = not shared and part.stop == row["length"]
        count = part.stop - part.start
        return read_frames(self._file(row, key), first + part.start, count, self.fps, whole=last)

    def _matrix(self, row: dict[str, Any], key: str, column: pa.ChunkedArray) -> np.ndarray:
        """A column of numbers, or of lists as long as `info.json` says, as (T, D), float32."""
        array = column.combine_chunks()
        if pa.types.is_nested(array.type):
            width, widths = self.info["features"][key]["shape"][0], pc.unique(pc.list_value_length(array)).to_pylist()
            if widths != [width]:
                raise ValueError(
                    f"{str(self._path(row))!r}: {key!r} must be {width} numbers in every row, got {widths}."
                )
            array = array.flatten()
        return array.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)

    def _rows(self, row: dict[str, Any], columns: list[str]) -> pa.Table:
        """Columns of one episode from its parquet file; the columns read last are kept, for the episode after it."""
        path = self._path(row)
        key = (path, *columns)
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != key:
            kept = key, _read_table(self._file(row), columns=[*columns, "episode_index"])
            self.__dict__["_kept"] = kept
        table = kept[1]
        return table.filter(pc.equal(table["episode_index"], row["episode_index"]))

    def _path(self, row: dict[str, Any], camera: str | None = None) -> Path:
        """The parquet file of an episode, or the video of a camera."""
        if self.info["codebase_version"] == VERSION:
            folder = "data" if camera is None else f"videos/{camera}"
            place = {name: int(_entry(row, f"{folder}/{name}")) for name in ("chunk_index", "file_index")}
        else:
            number = row["episode_index"]
            place = {"episode_chunk": number // self.info["chunks_size"], "episode_index": number}
        template = self.info["data_path" if camera is None else "video_path"]
        return self.root / template.format(video_key=camera, **place)

    def _file(self, row: dict[str, Any], camera: str | None = None) -> Path:
        """The same on this disk, downloaded if it is not here."""
        path = self._path(row, camera)
        if self.remote is None:
            return path
        return self.remote.fetch(path.relative_to(self.root).as_posix(), "data" if camera is None else camera)


def _entry(row: dict[str, Any], name: str) -> Any:
    """What `meta/episodes` says of an episode, which some broken ones lack."""
    if row.get(name) is None:
        raise ValueError(f"{name!r} is missing in 'meta/episodes'.")
    return row[name]


def _read_table(path: Path, **options: Any) -> pa.Table:
    try:
        return pq.read_table(path, **options)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error


def _decode_image(picture: dict[str, Any], root: Path) -> np.ndarray:
    source: Any = io.BytesIO(picture["bytes"]) if picture.get("bytes") else root / picture["path"]
    try:
        with PIL.Image.open(source) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"cannot read picture {picture.get('path')!r}: {error}") from error


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
