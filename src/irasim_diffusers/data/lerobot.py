"""Read LeRobotDataset folders, v3.0 and v2.1, without a dependency on lerobot.

Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3. In v3.0 many episodes share one parquet file (vectors, a
row a frame) and one mp4 file for each camera; `meta/episodes` says where each episode lies in them. In v2.1 every episode
has files of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .episode import Episode, InOrder, camera_layout, sizes_digest, tile, window_slice
from .hub import HubFiles
from .video import read_frames

VERSION = "v3.0"
READABLE_VERSIONS = (VERSION, "v2.1")
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
OWN_ENTRY = "irasim"
"""Entry of the feature `action` in info.json for what LeRobot does not store: derivation, units and camera layout."""


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
        written = self._own_entry.get("cameras")
        if self.cameras is None and written is not None and {key for row in written for key in row} <= set(known):
            object.__setattr__(self, "cameras", written)
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
    def _own_entry(self) -> dict[str, Any]:
        return self.info["features"].get("action", {}).get(OWN_ENTRY, {})

    @property
    def action_derivation(self) -> str:
        """How the actions follow from states, as `write_lerobot` stored it; see `actions.DERIVATIONS`."""
        return self._own_entry.get("action_derivation", "recorded")

    @property
    def action_units(self) -> list[str | None] | None:
        """Units of the action components, if `write_lerobot` stored them."""
        return self._own_entry.get("action_units")

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

    def flags(self, number: int) -> dict[str, np.ndarray]:
        """Bool and integer features (T, D) of one episode, for example `next.done`, in the recorded type."""
        keys = [
            key
            for key, feature in self.info["features"].items()
            if feature["dtype"].startswith(("bool", "int", "uint")) and key not in INDEX_FEATURES
            if len(feature["shape"]) == 1 and key != "action"
        ]
        row = self.rows[number]
        table = self._rows(row, keys) if keys else {}
        return {key: self._matrix(row, key, table[key], self.info["features"][key]["dtype"]) for key in keys}

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

    def _matrix(self, row: dict[str, Any], key: str, column: pa.ChunkedArray, dtype: str = "float32") -> np.ndarray:
        """A column of numbers, or of lists as long as `info.json` says, as (T, D)."""
        array = column.combine_chunks()
        if pa.types.is_nested(array.type):
            width, widths = self.info["features"][key]["shape"][0], pc.unique(pc.list_value_length(array)).to_pylist()
            if widths != [width]:
                raise ValueError(
                    f"{str(self._path(row))!r}: {key!r} must be {width} numbers in every row, got {widths}."
                )
            array = array.flatten()
        return array.to_numpy(zero_copy_only=False).astype(dtype).reshape(len(column), -1)

    def _rows(self, row: dict[str, Any], columns: list[str]) -> pa.Table:
        """Columns of one episode from its parquet file; the columns of the last file are kept, for the next episode."""
        path = self._path(row)
        key = (path, *columns)
        kept = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            for other in [other for other in kept if other[0] != path]:
                del kept[other]
            kept[key] = _read_table(self._file(row), columns=[*columns, "episode_index"])
        table = kept[key]
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
