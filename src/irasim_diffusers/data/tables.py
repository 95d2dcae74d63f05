"""Read tables of the `datasets` library, with one row per episode.

A row has videos or images, actions and states.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import choose_action_columns, finite_vector
from .content_hash import media_stamp, table_hash
from .episode import Episode, InOrder, camera_layout, tile, window_slice
from .pictures import read_picture, stack_pictures
from .video import count_frames, read_frames, read_video

MAX_DOWNLOAD = 1 << 30
"""Maximum size of a remote video or image in bytes; it is read into memory."""
MAX_KEPT = 1 << 28
"""Maximum total size in bytes of the downloads kept in memory; the last download is always kept."""
TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class TableEpisodes(InOrder):
    """A `datasets.Dataset` or `datasets.IterableDataset` of episodes.

    A camera is a column of videos or of lists of images, which are stored in the table, in local files or on the web (http,
    https, hf). Videos are decoded without torchcodec. An episode has as many actions as frames, or one fewer.

    Args:
        dataset: The table.
        cameras: Columns: one camera, several stacked cameras, or rows of cameras. After construction, the layout as a tuple of
            rows.
        action_column: Column of actions, (T, A) or (T - 1, A), or several that are concatenated; None selects `actions`, or the
            only column with a similar name. After construction, a tuple.
        state_columns: Columns of states, (T, S).
        fps: Frames per second.
        length: Number of rows of an `IterableDataset`, which is fast to read only in order.
        origin: Text that identifies the rows of an `IterableDataset`, for example a name and a commit.

    Raises:
        ValueError: If a column does not exist or has the wrong type, the action column is missing or ambiguous, or `length` or
            `origin` is missing for an `IterableDataset`.
    """

    dataset: Any
    cameras: Any = "video"
    action_column: Any = None
    state_columns: Sequence[str] = ()
    fps: float | None = None
    length: int | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        dataset, layout = self.dataset, camera_layout(self.cameras)
        if self._streams and (self.length is None or self.origin is None):
            missing = " and ".join(name for name in ("length", "origin") if getattr(self, name) is None)
            raise ValueError(f"`length` and `origin` are required for an `IterableDataset`, got no {missing}.")
        if dataset.column_names is None:  # a streamed table whose card does not declare its columns
            dataset = dataset._resolve_features()
        names, known = [name for row in layout for name in row], dataset.column_names
        for column in (*names, *self.state_columns):
            if column not in known:
                raise ValueError(
                    f"column {column!r} does not exist in {self.name!r}, which has {known}: select others with --cameras or "
                    "--state_columns."
                )
        actions = self.action_column or ("actions" if "actions" in known else None)
        others = [column for column in known if column not in (*names, *self.state_columns)]
        columns = choose_action_columns(actions, known if actions else others, self.name)
        object.__setattr__(self, "action_column", columns)
        dataset = dataset.select_columns(list(dict.fromkeys((*names, *self.action_column, *self.state_columns))))
        for name in names:
            dataset = self._undecoded(dataset, name)
        object.__setattr__(self, "dataset", dataset)
        object.__setattr__(self, "cameras", layout)

    def _undecoded(self, dataset: Any, name: str) -> Any:
        """Return the table with decoding disabled for a column of videos or images."""
        import datasets

        feature = dataset.features[name]
        if isinstance(feature, datasets.Video):
            return dataset.cast_column(name, datasets.Video(decode=False))
        if not isinstance(getattr(feature, "feature", None), datasets.Image):
            raise ValueError(
                f"column {name!r} of {self.name!r} must contain a video or a list of images, got {feature}."
            )
        if self._streams:  # in other tables the cast would rewrite all images
            return dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
        return dataset

    @property
    def name(self) -> str:
        """Name of the table; without one, its fingerprint, or `origin` of a streamed table."""
        return self.dataset.info.dataset_name or self._fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """Columns, fingerprint and a hash of vectors and media; for a streamed table, columns and origin."""
        columns = {"cameras": self.cameras, "action": self.action_column, "states": list(self.state_columns)}
        content = {} if self._streams else {"content": self._content_hash()}
        return {"fingerprint": self._fingerprint, **columns, **content}

    def _content_hash(self) -> str:
        digest, names = hashlib.sha256(), [name for row in self.cameras for name in row]
        vectors = self._rows.select_columns(list(dict.fromkeys((*self.action_column, *self.state_columns))))
        for batch in vectors.iter(1000):
            digest.update(table_hash(batch).encode())
        for batch in self._rows.select_columns(names).iter(1000):
            paths = [path for name in names for path in _outside_files(batch[name])]
            digest.update(json.dumps([media_stamp(path) or path for path in paths]).encode())
        for file in self.dataset.cache_files:  # images inside the table
            digest.update(json.dumps(media_stamp(file["filename"], modified=False)).encode())
        return digest.hexdigest()

    @property
    def _streams(self) -> bool:
        import datasets

        return isinstance(self.dataset, datasets.IterableDataset)

    @property
    def _fingerprint(self) -> str:
        return str(self.origin) if self._streams else self.dataset._fingerprint

    @cached_property
    def _rows(self) -> Any:
        """Rows with undecoded videos and images."""
        return _StreamedRows(self.dataset) if self._streams else self.dataset.with_format("arrow")

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.dataset) if self.length is None else self.length

    def __getitem__(self, number: int) -> Episode:
        """Read one episode.

        Raises:
            ValueError: If the table has fewer rows than `length`, a video or an image is missing or unreadable, a number is missing
                or not finite, the numbers of frames, actions and states disagree, or the images of the cameras cannot be tiled.
        """
        return self._read(number, None)

    def window(self, number: int, start: int, length: int) -> Episode:
        """Read a part of an episode; avoid decoding other frames.

        Args:
            number: Index of the episode.
            start: First frame.
            length: Number of frames.

        Raises:
            ValueError: If the episode is broken, or the window is empty or exceeds it.
        """
        return self._read(number, (start, length))

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """Read `action` and the states of one episode, each (T, D), float32.

        Raises:
            ValueError: If the table has fewer rows than `length`, the numbers of frames, actions and states disagree, a number is
                missing or not finite, or a video is unreadable.
        """
        row = self._row(number)
        try:
            return self._vectors(row, self._num_frames(row))
        except (ValueError, TypeError) as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error

    def component_names(self, key: str) -> list[str] | None:
        """Return None: tables do not name components."""
        return None

    def _row(self, number: int) -> dict[str, Any]:
        number = range(len(self))[number]
        try:
            return self._rows[number] if self._streams else self._rows[number : number + 1].to_pylist()[0]
        except EOFError as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error

    def _read(self, number: int, window: tuple[int, int] | None) -> Episode:
        row = self._row(number)
        try:
            total = None if window is None else self._num_frames(row)
            part = slice(None) if window is None or total is None else window_slice(*window, total)
            views = {name: _frames(row[name], name, part, total) for names in self.cameras for name in names}
            frames = tile(self.cameras, views)
            vectors = self._vectors(row, len(frames) if total is None else total)
        except (ValueError, TypeError) as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error
        vectors = {key: value[part] for key, value in vectors.items()}
        return Episode(frames, vectors.pop("action"), vectors)

    def _num_frames(self, row: dict[str, Any]) -> int:
        key = self.cameras[0][0]
        value = row[key]
        if not value:
            raise ValueError("a video or an image is missing: add the file, or remove the episode.")
        return count_frames(_content(value), _video_name(value, key)) if isinstance(value, dict) else len(value)

    def _vectors(self, row: dict[str, Any], length: int) -> dict[str, np.ndarray]:
        """Check the actions and states of a row, and convert them to float32.

        If no action is recorded after the last frame, the last action is repeated.
        """
        parts = []
        for key in self.action_column:
            part = _matrix(row[key], key)
            if len(part) == length - 1:
                part = np.concatenate([part, part[-1:]])  # the action after the last frame is never used
            if len(part) != length:
                wanted = f"{length} frames require {length} actions, or one fewer"
                wanted = "one frame requires one action" if length == 1 else wanted
                raise ValueError(f"{wanted}, got {len(part)} in {key!r}: remove the episode.")
            parts.append(part)
        states = {key: _matrix(row[key], key) for key in self.state_columns}
        for key, value in states.items():
            if len(value) != length:
                raise ValueError(
                    f"states of {length} frames must be ({length}, S), got {value.shape} in column {key!r}."
                )
        return {"action": np.concatenate(parts, axis=1)} | states


def _matrix(values: Any, key: str) -> np.ndarray:
    """Convert numbers (T, D), or (T,) to (T, 1), to float32."""
    if values is None:
        raise ValueError(f"column {key!r} is empty.")
    matrix = finite_vector(values, key)
    if matrix.ndim not in (1, 2):
        raise ValueError(f"column {key!r} must contain one vector per frame, got shape {matrix.shape}.")
    return matrix.reshape(len(matrix), -1) if len(matrix) else np.zeros((0, 1), np.float32)


class _StreamedRows:
    """Rows of a `datasets.IterableDataset` by index; reading an earlier row restarts the iteration."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.number = -1
        self.row: dict[str, Any] = {}
        self.following: Iterator[dict[str, Any]] | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        if self.following is None or number < self.number:
            self.following, self.number = iter(self.dataset.skip(number)), number - 1
        while self.number < number:
            row = next(self.following, None)
            if row is None:
                raise EOFError(
                    f"the dataset has only {self.number + 1} rows: pass at most this number as `max_episodes` "
                    "(--max_train_episodes)."
                )
            self.row, self.number = row, self.number + 1
        return self.row


def _content(value: dict[str, Any]) -> BinaryIO | str:
    """Return a video or an image as a binary file, or the path of a local file.

    A table may be untrusted: its paths must open neither devices nor other protocols of `fsspec`.
    """
    path = value.get("path")
    if value.get("bytes"):
        return io.BytesIO(value["bytes"])
    if not isinstance(path, str) or not path:
        raise ValueError("a video or an image has neither content nor a path.")
    if "://" in path or "::" in path:
        return io.BytesIO(_download(path))
    if "\0" in path or not os.path.isfile(path):
        raise ValueError(f"{path[:200]!r} is not a file: download it, or correct the path in the table.")
    return path


_downloads: dict[str, bytes] = {}
"""The last downloads, oldest first, kept because the cameras of an episode are read more than once."""


def _download(url: str) -> bytes:
    """Read a file of at most `MAX_DOWNLOAD` bytes, and keep it until `MAX_KEPT` bytes are exceeded."""
    content = _downloads.pop(url, None)
    if content is None:
        content = _read_url(url)
    while _downloads and len(content) + sum(map(len, _downloads.values())) > MAX_KEPT:
        del _downloads[next(iter(_downloads))]
    _downloads[url] = content
    return content


def _read_url(url: str) -> bytes:
    name, scheme = repr(url[:200]), url.partition("://")[0]
    if "::" in url or scheme not in ("http", "https", "hf"):
        raise ValueError(f"{name} must be a local path, or an http, https or hf URL: download the file.")
    try:
        opened = fsspec.open(url, "rb") if scheme == "hf" else urllib.request.urlopen(url, timeout=TIMEOUT)
        with opened as file:
            content = file.read(MAX_DOWNLOAD + 1)
    except Exception as error:  # the protocols raise errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {name}: {reason}.") from error
    if len(content) > MAX_DOWNLOAD:
        raise ValueError(f"{name} must have at most {MAX_DOWNLOAD} bytes: download the file.")
    return content


def _video_name(video: dict[str, Any], key: str) -> str:
    """Return the path of a video, or its column, for error messages."""
    path = video.get("path")
    return repr(path[:200]) if isinstance(path, str) and path else f"column {key!r}"


def _frames(value: Any, key: str, part: slice, total: int | None) -> np.ndarray:
    """Decode a part of a video or a list of images.

    Args:
        value: The video or the images.
        key: Name of the column, for error messages.
        part: The frames to decode.
        total: Total number of frames; None to decode all of them.
    """
    if isinstance(value, dict):
        name = _video_name(value, key)
        if total is None:
            return read_video(_content(value), name)
        return read_frames(_content(value), part.start, part.stop - part.start, whole=part.stop == total, name=name)
    if not value or not all(isinstance(picture, dict) for picture in value):
        raise ValueError("a video or an image is missing: add the file, or remove the episode.")
    first = part.start or 0
    numbered = enumerate(value[part], first)
    frames = [read_picture(_content(picture), f"{key!r} at frame {frame}") for frame, picture in numbered]
    return stack_pictures(frames, repr(key), first)


def _outside_files(column: pa.ChunkedArray) -> list[str]:
    """Return the paths of the videos or images of a column that are not inside the table."""
    array = column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        array = array.flatten()
    inside, paths = pc.is_valid(pc.struct_field(array, "bytes")), pc.struct_field(array, "path")
    return paths.filter(pc.and_(pc.is_valid(paths), pc.invert(inside))).to_pylist()
