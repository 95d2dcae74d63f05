"""Data sets of the `datasets` library: a row an episode, with a video or pictures and a table of actions."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, BinaryIO

import fsspec
import numpy as np
import PIL.Image

from .episode import Episode, InOrder, camera_layout, tile, window_slice
from .video import count_frames, read_frames, read_video


@dataclass(frozen=True)
class TableEpisodes(InOrder):
    """A `datasets.Dataset` whose rows are episodes, or a `datasets.IterableDataset`.

    A camera is a column of the type Video, or a list of pictures; videos are decoded here and need no torchcodec. Actions
    have as many rows as frames, or one fewer.

    Args:
        dataset: The data set.
        cameras: Column of the camera, several that are stacked, or rows of them.
        action_column: Column of actions, (T, A) or (T - 1, A).
        state_columns: Columns of states, (T, S).
        fps: Frames a second.
        length: Number of rows of an `IterableDataset`, which are quick to read in order.
        origin: What tells the rows of an `IterableDataset` from others, a name and a commit for example.

    Raises:
        ValueError: If a column does not exist, or the length of an `IterableDataset` is missing.
    """

    dataset: Any
    cameras: Any = "video"
    action_column: str = "actions"
    state_columns: Sequence[str] = ()
    fps: float | None = None
    length: int | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        import datasets

        dataset, layout = self.dataset, camera_layout(self.cameras)
        if self._streams and (self.length is None or self.origin is None):
            raise ValueError(f"`length` and `origin` must be given for {self.name!r}, whose rows are streamed.")
        if dataset.column_names is None:  # a stream whose first rows tell
            dataset = dataset._resolve_features()
        columns = [*(name for row in layout for name in row), self.action_column, *self.state_columns]
        for column in columns:
            if column not in dataset.column_names:
                raise ValueError(
                    f"column {column!r} does not exist in {self.name!r}; it has {dataset.column_names}: name others "
                    "with --cameras, --action_column or --state_columns."
                )
        dataset = dataset.select_columns(columns)
        for name in [name for row in layout for name in row]:
            feature = dataset.features[name]
            if isinstance(feature, datasets.Video):
                dataset = dataset.cast_column(name, datasets.Video(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                if self._streams:  # else the cast would write all pictures anew
                    dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
            else:
                raise ValueError(
                    f"column {name!r} of {self.name!r} must hold a video or a list of images, got {feature}."
                )
        object.__setattr__(self, "dataset", dataset)
        object.__setattr__(self, "cameras", layout)

    @property
    def name(self) -> str:
        """The data set's name, or what tells it from others."""
        return self.dataset.info.dataset_name or self._fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """The library's own fingerprint of the data, or their origin, and the columns."""
        return {"fingerprint": self._fingerprint, "cameras": self.cameras, "action": self.action_column}

    @property
    def _streams(self) -> bool:
        import datasets

        return isinstance(self.dataset, datasets.IterableDataset)

    @property
    def _fingerprint(self) -> str:
        return str(self.origin) if self._streams else self.dataset._fingerprint

    @cached_property
    def _rows(self) -> Any:
        """Rows whose pictures are not decoded."""
        return _StreamedRows(self.dataset) if self._streams else self.dataset.with_format("arrow")

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.dataset) if self.length is None else self.length

    def __getitem__(self, number: int) -> Episode:
        """One episode.

        Raises:
            ValueError: If a video is unreadable, or frames and actions disagree.
        """
        return self._read(number, None)

    def window(self, number: int, start: int, length: int) -> Episode:
        """Frames of an episode from frame `start` on, with what goes with them; no others are decoded in vain.

        Raises:
            ValueError: As for the episode, or if the window does not lie within it.
        """
        return self._read(number, (start, length))

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """`action` and states of one episode."""
        row = self._row(number)
        try:
            return self._vectors(row, _length(row[self.cameras[0][0]]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error

    def component_names(self, key: str) -> list[str] | None:
        """None: such a data set names no components."""
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
            total = None if window is None else _length(row[self.cameras[0][0]])
            part = slice(None) if window is None or total is None else window_slice(*window, total)
            views = {name: _frames(row[name], part, total) for names in self.cameras for name in names}
            frames = tile(self.cameras, views)
            vectors = self._vectors(row, len(frames) if total is None else total)
        except (ValueError, TypeError) as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error
        vectors = {key: value[part] for key, value in vectors.items()}
        return Episode(frames, vectors.pop("action"), vectors)

    def _vectors(self, row: dict[str, Any], length: int) -> dict[str, np.ndarray]:
        actions = np.asarray(row[self.action_column], dtype=np.float32)
        if actions.ndim != 2 or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite and (n, A), got shape {actions.shape}.")
        if len(actions) == length - 1:
            actions = np.concatenate([actions, actions[-1:]])  # leads out of the episode: never used
        if len(actions) != length:
            raise ValueError(f"{length} frames want {length} actions, or one fewer, got {len(actions)}.")
        states = {key: np.asarray(row[key], dtype=np.float32) for key in self.state_columns}
        for key, value in states.items():
            if value.ndim != 2 or len(value) != length:
                raise ValueError(f"{length} frames want states ({length}, S), got {value.shape} in column {key!r}.")
        return {"action": actions} | states


class _StreamedRows:
    """Rows of a `datasets.IterableDataset` by number: reads on where it can, and begins anew where it must go back."""

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
                    f"the data end after {self.number + 1} rows: give that as `max_episodes` (--max_train_episodes)."
                )
            self.row, self.number = row, self.number + 1
        return self.row


def _content(value: dict[str, Any]) -> BinaryIO | str:
    """The file of a video or a picture: in the table, on this disk, or elsewhere."""
    if value.get("bytes"):
        return io.BytesIO(value["bytes"])
    if "://" not in value["path"]:
        return value["path"]
    return io.BytesIO(_download(value["path"]))


@lru_cache(maxsize=4)  # an episode's cameras, which are read more than once
def _download(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ValueError(f"{path!r} does not exist.") from error


def _length(value: Any) -> int:
    """Number of frames of a video or a list of pictures."""
    return count_frames(_content(value)) if isinstance(value, dict) else len(value or ())


def _frames(value: Any, part: slice, total: int | None) -> np.ndarray:
    """Frames of a video or a list of pictures; all, or a part of so many."""
    if isinstance(value, dict):
        if total is None:
            return read_video(_content(value))
        return read_frames(_content(value), part.start, part.stop - part.start, whole=part.stop == total)
    if not value or not all(isinstance(picture, dict) for picture in value):
        raise ValueError("a picture is missing, or all are.")
    return np.stack([_decode_picture(picture) for picture in value[part]])


def _decode_picture(picture: dict[str, Any]) -> np.ndarray:
    content = _content(picture)
    try:
        with PIL.Image.open(content) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"cannot read picture {picture.get('path')!r}: {error}") from error
