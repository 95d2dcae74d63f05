"""Data sets of the `datasets` library: a row an episode, with a video or pictures and a table of actions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from .episode import Episode, InOrder, camera_layout, tile
from .video import read_video


@dataclass(frozen=True)
class TableEpisodes(InOrder):
    """A `datasets.Dataset` whose rows are episodes.

    A camera is a column of the type Video, or a list of pictures; videos are decoded here and need no torchcodec. Actions
    have as many rows as frames, or one fewer.

    Args:
        dataset: The data set.
        cameras: Column of the camera, several that are stacked, or rows of them.
        action_column: Column of actions, (T, A) or (T - 1, A).
        state_columns: Columns of states, (T, S).
        fps: Frames a second.

    Raises:
        ValueError: If a column does not exist.
    """

    dataset: Any
    cameras: Any = "video"
    action_column: str = "actions"
    state_columns: Sequence[str] = ()
    fps: float | None = None

    def __post_init__(self) -> None:
        import datasets

        layout = camera_layout(self.cameras)
        columns = [*(name for row in layout for name in row), self.action_column, *self.state_columns]
        for column in columns:
            if column not in self.dataset.column_names:
                raise ValueError(
                    f"column {column!r} does not exist in {self.name!r}; it has {self.dataset.column_names}."
                )
        dataset = self.dataset.select_columns(columns)
        for name in [name for row in layout for name in row]:
            feature = dataset.features[name]
            if isinstance(feature, datasets.Video):
                dataset = dataset.cast_column(name, datasets.Video(decode=False))
            elif not isinstance(getattr(feature, "feature", None), datasets.Image):
                raise ValueError(
                    f"column {name!r} of {self.name!r} must hold a video or a list of images, got {feature}."
                )
        object.__setattr__(self, "dataset", dataset)
        object.__setattr__(self, "cameras", layout)

    @property
    def name(self) -> str:
        """The data set's name, or its fingerprint."""
        return self.dataset.info.dataset_name or self.dataset._fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """The library's own fingerprint of the data, and the columns."""
        return {"fingerprint": self.dataset._fingerprint, "cameras": self.cameras, "action": self.action_column}

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.dataset)

    def __getitem__(self, number: int) -> Episode:
        """One episode.

        Raises:
            ValueError: If a video is unreadable, or frames and actions disagree.
        """
        try:
            row = self.dataset[number]
            frames = tile(self.cameras, {name: _frames(row[name]) for names in self.cameras for name in names})
            vectors = self._vectors(row, len(frames))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error
        return Episode(frames, vectors.pop("action"), vectors)

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """`action` and states of one episode."""
        columns = [self.action_column, *self.state_columns]
        try:
            return self._vectors(self.dataset.select_columns(columns)[number], None)
        except (ValueError, TypeError) as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error

    def component_names(self, key: str) -> list[str] | None:
        """None: such a data set names no components."""
        return None

    def _vectors(self, row: dict[str, Any], length: int | None) -> dict[str, np.ndarray]:
        actions = np.asarray(row[self.action_column], dtype=np.float32)
        if actions.ndim != 2 or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite and (n, A), got shape {actions.shape}.")
        if length is not None and len(actions) == length - 1:
            actions = np.concatenate([actions, actions[-1:]])  # leads out of the episode: never used
        if length is not None and len(actions) != length:
            raise ValueError(f"{length} frames want {length} actions, or one fewer, got {len(actions)}.")
        states = {key: np.asarray(row[key], dtype=np.float32) for key in self.state_columns}
        for key, value in states.items():
            if value.ndim != 2 or length not in (None, len(value)):
                raise ValueError(f"{length} frames want states ({length}, S), got {value.shape} in column {key!r}.")
        return {"action": actions} | states


def _frames(value: Any) -> np.ndarray:
    if isinstance(value, dict):
        return read_video(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    if not value or not all(isinstance(picture, PIL.Image.Image) for picture in value):
        raise ValueError("a picture is missing, or all are.")
    return np.stack([np.asarray(picture.convert("RGB")) for picture in value])
