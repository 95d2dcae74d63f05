"""Read LeRobotDataset folders, v3.0 and v2.1, without a dependency on lerobot.

Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3. In v3.0 several episodes share a Parquet file (vectors, one row
per frame) and an mp4 file for each camera; `meta/episodes` holds the episodes' positions. In v2.1 each episode has separate files.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..json_files import read_json_object
from .columns import choose_action_columns, component_names_of, finite_vector
from .content_hash import content_hash
from .episode import Episode, InOrder, camera_layout, check_max_episodes, first_task, tile, window_slice
from .hub import HubFiles
from .lerobot_metadata import NUMBERS, OWN_ENTRY, check_info, check_rows, row_length, row_number, row_seconds
from .pictures import read_picture, stack_pictures
from .record_files import parquet_columns, path_inside, read_json_lines, read_parquet
from .video import read_numbered_frames

VERSION = "v3.0"
READABLE_VERSIONS = (VERSION, "v2.1")
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
GRID_TOLERANCE = 0.01
"""Maximum distance of a timestamp from a multiple of 1 / fps, in frames, in addition to the rounding of float32."""
MAX_TOLERANCE = 0.25
"""Maximum total tolerance, in frames; beyond it, float32 timestamps cannot resolve frames."""
MIN_STRIDE_ROWS = 4
"""Above this number of rows, a constant distance of several frames indicates a wrong frame rate."""
MAX_ROWS = 1_000_000
"""Maximum number of rows of a `meta/episodes` file; for a data file, ten times the frames of its episodes are added."""


@dataclass(frozen=True)
class LeRobotFolder(InOrder):
    """A LeRobotDataset folder, v3.0 or v2.1, with video or image features.

    Args:
        root: The folder that contains `meta`, `data` and, for video features, `videos`.
        cameras: Feature keys: one camera, several stacked cameras, or rows of cameras; None selects the layout stored by
            `write_lerobot`, or the only camera. After construction, the layout as a tuple of rows.
        max_episodes: Maximum number of episodes, counted from the first.
        remote: Hub repository from which all files except `meta` are downloaded; None if the folder contains all files.
        split: A split in `info.json`, or a part of one as in `datasets`, `"train[:90%]"`; None for all episodes.
        action_column: Vector feature of the actions, or several that are concatenated; None selects `action`, or the only feature
            with a similar name. After construction, a tuple.
        state_columns: Vector features of the states; empty for all float ones except the actions.

    Raises:
        ValueError: If `max_episodes` is less than 1, the folder is not a LeRobotDataset of these versions, its metadata are
            invalid, a camera or the action is missing or ambiguous, a state does not exist, or the split is empty or unknown.
    """

    root: Path
    cameras: Any = None
    max_episodes: int | None = None
    remote: HubFiles | None = None
    split: str | None = None
    action_column: Any = None
    state_columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_max_episodes(self.max_episodes)
        object.__setattr__(self, "root", Path(self.root))
        if not self._info_path.is_file():
            raise ValueError(f"{self.name!r} is not a LeRobotDataset folder: {str(self._info_path)!r} is missing.")
        version = self.info.get("codebase_version") or "of unknown version"
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"{self.name!r} is a LeRobotDataset {version}; {' and '.join(READABLE_VERSIONS)} are supported: convert it with "
                "the scripts of LeRobot."
            )
        needed = ["fps", "features", "data_path"] + ([] if self._shares_files else ["chunks_size"])
        check_info(self.info, self._info_path, needed)
        known = [key for key, feature in self._features.items() if feature["dtype"] in ("video", "image")]
        written = self._own_entry.get("cameras")
        if self.cameras is None and written is not None and {key for row in written for key in row} <= set(known):
            object.__setattr__(self, "cameras", written)
        if self.cameras is None and len(known) != 1:
            raise ValueError(
                f"`cameras` must name one or more of {known} in {self.name!r}, got none: pass `cameras` (--cameras)."
            )
        layout = camera_layout(known[0] if self.cameras is None else self.cameras)
        for key in [key for row in layout for key in row]:
            if key not in known:
                raise ValueError(f"`cameras` must be among {known} in {self.name!r}, got {key!r}.")
        object.__setattr__(self, "cameras", layout)
        vectors = self._vector_features
        object.__setattr__(self, "action_column", choose_action_columns(self.action_column, vectors, self.name))
        for key in self.state_columns:
            if key not in vectors:
                raise ValueError(
                    f"`state_columns` (--state_columns) must be among {vectors} in {self.name!r}, got {key!r}."
                )
        if self.split is not None and not self.rows:
            raise ValueError(f"`split` must contain at least one episode of {self.name!r}, got {self.split!r}.")

    @property
    def name(self) -> str:
        """The folder, or the name on the Hub."""
        return str(self.root) if self.remote is None else self.remote.repo_id

    @property
    def _info_path(self) -> Path:
        return self.root / "meta" / "info.json"

    @cached_property
    def info(self) -> dict[str, Any]:
        """`meta/info.json`."""
        return read_json_object(self._info_path)

    @property
    def _features(self) -> dict[str, Any]:
        return self.info["features"]

    @property
    def _shares_files(self) -> bool:
        """Whether episodes share files, as in v3.0."""
        return self.info["codebase_version"] == VERSION

    @property
    def _vector_features(self) -> list[str]:
        return [key for key in self._features if key not in INDEX_FEATURES and self._width(key) is not None]

    @property
    def _states(self) -> tuple[str, ...]:
        """The selected states, or all float features except actions; `flags` reads the other features."""
        return tuple(self.state_columns) or tuple(
            key
            for key in self._vector_features
            if key not in ("action", *self.action_column) and self._features[key]["dtype"].startswith("float")
        )

    @property
    def _flag_features(self) -> list[str]:
        """Vector and string features that are neither actions nor states."""
        used = {"action", *self.action_column, *self._states}  # "action" is the name of the selected actions
        others = [key for key in self._vector_features if key not in used]
        texts = [key for key, feature in self._features.items() if feature["dtype"] == "string"]
        return [*others, *(key for key in texts if self._features[key].get("shape") in (None, [], [1]))]

    @property
    def unread_features(self) -> list[str]:
        """Features that no method reads, for example matrices; image and index features are not included."""
        read = {*INDEX_FEATURES, *self.action_column, *self._states, *self._flag_features}
        return [
            key for key, one in self._features.items() if key not in read and one["dtype"] not in ("video", "image")
        ]

    def _width(self, key: str) -> int | None:
        """Return the number of components of a numeric vector; None for other features."""
        feature = self._features[key]
        shape = feature.get("shape") or [1]
        return shape[0] if NUMBERS.fullmatch(feature["dtype"]) and len(shape) == 1 else None

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.info["fps"]

    @property
    def _own_entry(self) -> dict[str, Any]:
        return self._features.get("action", {}).get(OWN_ENTRY, {})

    @property
    def action_derivation(self) -> str:
        """How actions are computed from states, as stored by `write_lerobot`; see `actions.DERIVATIONS`."""
        return self._written_action.get("action_derivation", "recorded")

    @property
    def action_units(self) -> list[str | None] | None:
        """Units of the action components, if `write_lerobot` stored them."""
        return self._written_action.get("action_units")

    @property
    def _written_action(self) -> dict[str, Any]:
        """Entry that `write_lerobot` stored, if the actions are the feature `action`."""
        return self._own_entry if tuple(self.action_column) == ("action",) else {}

    @property
    def identity(self) -> dict[str, Any]:
        """Cameras, columns, `info.json`, and a hash of the files, or the name and commit on the Hub."""
        shared = {"cameras": self.cameras, "info": self.info, "episodes": len(self)}
        shared |= {"action": self.action_column, "states": self._states}
        if self.rows != self._all_rows[: len(self)]:
            shared["numbers"] = [row["episode_index"] for row in self.rows]
        if self.remote is not None:
            return shared | {"root": self.remote.repo_id, "files": self.remote.revision}
        metadata = [file for path in self.root.glob("meta/episodes*") for file in (path, *path.rglob("[!.]*"))]
        files = [*(file for file in metadata if file.is_file()), *self.files]
        return shared | {"files": content_hash(self.root, files)}

    @property
    def files(self) -> list[Path]:
        """Files that are read for these episodes and cameras, except `info.json` and separate image files."""
        keys = [key for row in self.cameras for key in row if self._features[key]["dtype"] == "video"]
        files = set(self._episode_files)
        for row in self.rows:
            with suppress(ValueError):  # errors are reported when the episode is read
                files.add(self._path(row))
                files |= {self._path(row, key) for key in keys}
        return sorted(files)

    @property
    def _episode_files(self) -> list[Path]:
        if self._shares_files:
            return sorted(self.root.glob("meta/episodes/chunk-*/file-*.parquet"))
        return [path for path in (self.root / "meta" / "episodes.jsonl",) if path.is_file()]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the episodes in order, without statistics: index, length, tasks, position in the files."""
        rows = self._all_rows
        if self.split is not None:
            rows = [rows[number] for part in self._parts(self.split) for number in part]
        return rows[: self.max_episodes]

    def _parts(self, split: str) -> list[range]:
        """Return the positions of a split's episodes among all episodes."""
        from datasets import ReadInstruction

        every = range(len(self._all_rows))
        named = {
            name: every[slice(*map(int, bounds.split(":")))]
            for name, bounds in (self.info.get("splits") or {"train": f"0:{len(every)}"}).items()
        }
        try:
            parts = ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in named.items()})
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"`split` must be one of {sorted(named)} in {self.name!r}, or a part such as 'train[:90%]' or 'train[90%:]', got "
                f"{split!r}."
            ) from error
        return [named[part.splitname][part.from_ : part.to] for part in parts]

    @cached_property
    def _all_rows(self) -> list[dict[str, Any]]:
        """Rows of all splits in the order of their indices; a repeated row counts once."""
        rows: dict[int, dict[str, Any]] = {}
        for file in self._episode_files:
            if file.suffix == ".parquet":
                names = [name for name in parquet_columns(file) if not name.startswith(("stats/", "meta/episodes/"))]
                found = read_parquet(file, names, max_rows=MAX_ROWS).to_pylist()
            else:
                found = read_json_lines(file)
            for row in found:
                number = row.get("episode_index")
                if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                    raise ValueError(
                        f"{str(file)!r}: 'episode_index' must be a non-negative integer in every row, got {number!r}."
                    )
                if rows.setdefault(number, row) != row:
                    changed = sorted(key for key in row if rows[number].get(key) != row[key])
                    raise ValueError(
                        f"{str(file)!r} contradicts an earlier row of episode {number} of {self.name!r} in {changed}: remove one "
                        "of the rows."
                    )
        check_rows(rows.values(), self.info, self.name)
        return [rows[number] for number in sorted(rows)]

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.rows)

    def __getitem__(self, number: int) -> Episode:
        """Read one episode; only its part of the videos is decoded.

        Raises:
            ValueError: If a file, an image, a vector or a metadata entry is missing or invalid, a video or the table has the wrong
                length, a timestamp is invalid, the task is not a string, or the images of the cameras cannot be tiled.
        """
        return self.window(number, 0)

    def window(self, number: int, start: int, length: int | None = None) -> Episode:
        """Read a part of an episode; avoid decoding other frames.

        Args:
            number: Index of the episode.
            start: First frame.
            length: Number of frames; None for all remaining frames.

        Raises:
            ValueError: If the episode is broken, or the window is empty or exceeds it.
        """
        row = self.rows[number]
        vectors = self.vectors(number)
        try:
            part = window_slice(start, length, row_length(row))
            views = {key: self._frames(row, key, part) for rows in self.cameras for key in rows}
            frames = tile(self.cameras, views)
            task = first_task(row.get("tasks"))
        except ValueError as error:
            raise ValueError(f"episode {row['episode_index']} of {self.name!r}: {error}") from error
        vectors = {key: value[part] for key, value in vectors.items()}
        return Episode(frames, vectors.pop("action"), vectors, task)

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """Read `action` and the states (T, D) of one episode, float32.

        Raises:
            ValueError: If a vector or metadata is missing or invalid, or the file is unreadable or has the wrong number of rows.
        """
        row = self.rows[number]
        try:
            table, length = self._table(row), row_length(row)
            if len(table) != length:
                raise ValueError(
                    f"expected {length} frames, found {len(table)} rows in {str(self._path(row))!r}: remove the episode, or "
                    "record it again."
                )
            keys, path = (*self.action_column, *self._states), str(self._path(row))
            vectors = {key: finite_vector(self._values(row, key, table[key]), key, path) for key in keys}
            action = np.concatenate([vectors[key] for key in self.action_column], axis=1)
            return {"action": action} | {key: vectors[key] for key in self._states}
        except ValueError as error:
            raise ValueError(f"episode {row['episode_index']} of {self.name!r}: {error}") from error

    def flags(self, number: int) -> dict[str, np.ndarray]:
        """Read features (T, D) that are neither actions nor states, such as `next.done`, as recorded.

        Raises:
            ValueError: If the file is unreadable, or a value is missing or NaN, or does not have the type or shape in `info.json`.
        """
        row = self.rows[number]
        try:
            table = self._table(row)
            keys = [key for key in self._flag_features if key in table.column_names]
            return {key: self._flag(row, key, table[key]) for key in keys}
        except ValueError as error:
            raise ValueError(f"episode {row['episode_index']} of {self.name!r}: {error}") from error

    def _flag(self, row: dict[str, Any], key: str, column: pa.ChunkedArray) -> np.ndarray:
        """Convert a column of numbers, bools or strings to (T, D)."""
        values, dtype = self._values(row, key, column), self._features[key]["dtype"]
        kind: Any = str if dtype == "string" else (int, float, np.number, np.bool_)
        typed = (dtype != "string" and values.dtype != object) or all(isinstance(value, kind) for value in values.flat)
        with np.errstate(invalid="ignore"):
            result = values if dtype == "string" or not typed else values.astype(dtype)
        if not typed or not (result == values).all():
            raise ValueError(f"{str(self._path(row))!r}: {key!r} must be of type {dtype} in every row, and not NaN.")
        return result

    def component_names(self, key: str) -> list[str] | None:
        """Names of the components of `action` or a state; None if unknown."""
        keys = self.action_column if key == "action" else (key,)
        return component_names_of({key: (self._features[key].get("names"), self._width(key) or 1) for key in keys})

    def _frames(self, row: dict[str, Any], key: str, part: slice) -> np.ndarray:
        """Decode the frames of one camera in a part of an episode."""
        if self._features[key]["dtype"] == "image":
            only = [("episode_index", "=", row["episode_index"])]
            pictures = read_parquet(self._file(row), [key], filters=only)[key].to_pylist()[part]
            frames = [self._picture(row, key, *numbered) for numbered in enumerate(pictures, part.start)]
            return stack_pictures(frames, repr(key), part.start)
        table, length = self._table(row), row_length(row)
        path, timed, first = self._file(row, key), "timestamp" in table.column_names, 0
        numbers = self._numbers(row, table["timestamp"]) if timed else np.arange(length)
        if self._shares_files:  # the frames of the next episode follow in the same file
            begin, end = (row_seconds(row, f"videos/{key}/{name}_timestamp") for name in ("from", "to"))
            first, found = round(begin * self.fps), round((end - begin) * self.fps)
            if found < length:
                raise ValueError(
                    f"expected {length} frames, found {found} in {str(self._path(row, key))!r} according to 'meta/episodes': "
                    "remove the episode, or record it again."
                )
            if found <= numbers[-1]:
                raise ValueError(
                    f"the timestamp of the last frame in {str(self._path(row))!r} is {numbers[-1] / self.fps:g} s, but the episode "
                    f"has only {found / self.fps:g} s in {str(self._path(row, key))!r}: remove the episode, or record it again."
                )
        ends = not self._shares_files and not timed and part.stop == length
        return read_numbered_frames(path, (first + numbers[part]).tolist(), self.fps, whole=ends)

    def _numbers(self, row: dict[str, Any], column: pa.ChunkedArray) -> np.ndarray:
        """Return the frame indices (T,) of an episode's rows by timestamp; idle frames may be missing."""
        path, key = str(self._path(row)), "timestamp"
        _check_numbers(column.type, key, path)
        times = column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)
        if not np.isfinite(times).all():
            raise ValueError(f"{path!r}: {key!r} must be a finite number of seconds in every row.")
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = np.rint(times * self.fps)
            tolerance = GRID_TOLERANCE + self.fps * np.spacing(np.abs(times).astype(np.float32))
            off = ~(np.abs(times * self.fps - numbers) <= np.where(tolerance < MAX_TOLERANCE, tolerance, -1))
        if off.any() or numbers[0] < 0:
            frame = int(np.argmax(off))
            raise ValueError(
                f"{path!r}: {key!r} of row {frame} is {times[frame]:g} s, which is not a frame time at {self.fps:g} frames/s: fix "
                "'fps' in 'meta/info.json', or resample the recording."
            )
        if (np.diff(numbers) <= 0).any():
            frame = int(np.argmax(np.diff(numbers) <= 0)) + 1
            raise ValueError(f"{path!r}: {key!r} must increase, got {times[frame]:g} s after {times[frame - 1]:g} s.")
        steps = set(np.diff(numbers)) if len(numbers) > MIN_STRIDE_ROWS else {1}
        if len(steps) == 1 and (step := steps.pop()) > 1:
            warnings.warn(
                f"{self.name!r}: rows are {step:g} frames apart: the recording has {self.fps / step:g} frames per second, not "
                f"{self.fps:g}.",
                stacklevel=2,
            )
        return numbers.astype(np.int64)

    def _picture(self, row: dict[str, Any], key: str, frame: int, picture: dict[str, Any] | None) -> np.ndarray:
        """Decode an image in the table, or an image file in the folder."""
        if not isinstance(picture, dict) or not (picture.get("bytes") or picture.get("path")):
            raise ValueError(f"{str(self._path(row))!r} has no image {key!r} at frame {frame}: remove the episode.")
        source: Any = io.BytesIO(picture["bytes"]) if picture.get("bytes") else path_inside(self.root, picture["path"])
        return read_picture(source, f"{key!r} at frame {frame} in {str(self._path(row))!r}")

    def _values(self, row: dict[str, Any], key: str, column: pa.ChunkedArray) -> np.ndarray:
        """Convert a column of numbers, or of lists with the length given in `info.json`, to (T, D)."""
        array, path, width = column.combine_chunks(), str(self._path(row)), self._width(key)
        kinds = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
        lists = any(check(array.type) for check in kinds)
        widths = pc.unique(pc.list_value_length(array)).to_pylist() if lists else [1]
        if width is not None and widths != [width]:
            found = str(widths).replace("None", "missing")
            raise ValueError(f"{path!r}: {key!r} must be {width} numbers in every row, got lengths {found}.")
        array = array.flatten() if lists else array
        if width is not None:
            _check_numbers(array.type, key, path)
        return array.to_numpy(zero_copy_only=False).reshape(len(column), -1)

    def _table(self, row: dict[str, Any]) -> pa.Table:
        """Read an episode's vectors, flags and timestamps; the file's table is kept for the next episode."""
        path = self._path(row)
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != path:
            file = self._file(row)
            present = parquet_columns(file)
            columns = dict.fromkeys([*self.action_column, *self._states, "episode_index"])
            columns |= dict.fromkeys(key for key in (*self._flag_features, "timestamp") if key in present)
            most = 10 * self._file_lengths[path] + MAX_ROWS
            kept = path, read_parquet(file, list(columns), max_rows=most)
            kind = kept[1]["episode_index"].type
            if not pa.types.is_integer(kind):
                raise ValueError(f"{str(path)!r}: 'episode_index' must contain integers, got {kind}.")
            self.__dict__["_kept"] = kept
        table = kept[1]
        return table.filter(pc.equal(table["episode_index"], row["episode_index"]))

    @cached_property
    def _file_lengths(self) -> Counter[Path]:
        """Frames in each Parquet file according to `meta/episodes`."""
        lengths: Counter[Path] = Counter()
        for row in self._all_rows:
            with suppress(ValueError):  # errors are reported when the episode is read
                lengths[self._path(row)] += row_length(row)
        return lengths

    def _path(self, row: dict[str, Any], camera: str | None = None) -> Path:
        """Return the path of an episode's Parquet file, or of a camera's video."""
        if self._shares_files:
            folder = "data" if camera is None else f"videos/{camera}"
            place = {name: row_number(row, f"{folder}/{name}") for name in ("chunk_index", "file_index")}
        else:
            number = row["episode_index"]
            place = {"episode_chunk": number // self.info["chunks_size"], "episode_index": number}
        entry = "data_path" if camera is None else "video_path"
        template = self.info.get(entry)
        if not template:
            raise ValueError(f"{str(self._info_path)!r} has no entry {entry!r}: add the path of the files.")
        try:
            return path_inside(self.root, template.format(video_key=camera, **place))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{str(self._info_path)!r}: {entry!r} has an invalid field or path: {error}") from error

    def _file(self, row: dict[str, Any], camera: str | None = None) -> Path:
        """Return the local path of the file of `_path`; download it if necessary."""
        path = self._path(row, camera)
        if self.remote is None:
            return path
        return self.remote.fetch(path.relative_to(self.root).as_posix(), "data" if camera is None else camera)


def _check_numbers(kind: pa.DataType, key: str, path: str) -> None:
    """Raise ValueError if a Parquet column does not contain numbers; null counts as a missing number."""
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if not any(check(kind) for check in checks):
        raise ValueError(f"{path!r}: {key!r} must contain numbers, got {kind}.")
