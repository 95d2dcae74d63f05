"""The one form in which every data source gives its episodes, and what all of them need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

CameraLayout: TypeAlias = tuple[tuple[str, ...], ...]
"""Names of cameras as their pictures are tiled: rows from the top, each from the left."""


@dataclass(frozen=True)
class Episode:
    """One recorded episode of a robot.

    Row k of `actions` is the command given at frame k; it drives the step that ends in frame k + 1.
    """

    frames: np.ndarray  # (T, H, W, 3), uint8 RGB
    actions: np.ndarray  # (T, A), float32, units of the data set
    states: dict[str, np.ndarray] = field(default_factory=dict)  # key -> (T, S), float32
    task: str = ""

    def __len__(self) -> int:
        return len(self.frames)


class EpisodeSource(Protocol):
    """What every data source is: episodes by number, and what is known of them without decoding a picture."""

    @property
    def name(self) -> str:
        """Where the data lie, for messages."""

    @property
    def fps(self) -> float | None:
        """Frames a second, where known."""

    @property
    def cameras(self) -> CameraLayout:
        """The cameras whose pictures are tiled into a frame."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells one set from another, for caches; JSON-able."""

    def __len__(self) -> int:
        """Number of episodes."""

    def __getitem__(self, number: int) -> Episode:
        """One episode; ValueError, naming file and episode, where it is broken."""

    def __iter__(self) -> Iterator[Episode]:
        """Every episode in order."""

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """`action` and states of one episode, (T, D) each, float32."""

    def component_names(self, key: str) -> list[str] | None:
        """Names of the components of `action` or a state, where known."""


class InOrder:
    """Lends data sources their iteration."""

    def __iter__(self: EpisodeSource) -> Iterator[Episode]:
        """Every episode in order."""
        return (self[number] for number in range(len(self)))


def camera_layout(cameras: str | Sequence[str] | Sequence[Sequence[str]]) -> CameraLayout:
    """A layout from one camera, several to be stacked, or rows of them; a row may be written as `left,right`."""
    rows = [cameras] if isinstance(cameras, str) else cameras
    return tuple(tuple(row.split(",")) if isinstance(row, str) else tuple(row) for row in rows)


def tile(layout: CameraLayout, views: Mapping[str, np.ndarray]) -> np.ndarray:
    """Videos (T, H, W, 3) of several cameras as one, by their layout.

    Raises:
        ValueError: If lengths differ, or pictures do not fit beside or below each other.
    """
    sizes = {name: views[name].shape for row in layout for name in row}
    if len({shape[0] for shape in sizes.values()}) > 1:
        raise ValueError(f"cameras disagree on the number of frames: { ({k: v[0] for k, v in sizes.items()}) }.")
    rows = [[views[name] for name in row] for row in layout]
    heights = [{view.shape[1] for view in row} for row in rows]
    widths = {sum(view.shape[2] for view in row) for row in rows}
    if any(len(height) > 1 for height in heights) or len(widths) > 1:
        shapes = {name: f"{shape[1]}x{shape[2]}" for name, shape in sizes.items()}
        raise ValueError(f"pictures of cameras {shapes} (height x width) make no rectangle in the layout {layout}.")
    return np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)
