"""The one form in which every data source gives its episodes, and what all of them need."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

Value = TypeVar("Value")
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

    def window(self, number: int, start: int, length: int) -> Episode:
        """`length` frames of an episode from frame `start` on, as in the whole of it, decoding no more than needed."""

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """`action` and states of one episode, (T, D) each, float32."""

    def component_names(self, key: str) -> list[str] | None:
        """Names of the components of `action` or a state, where known."""


class InOrder:
    """Lends data sources their iteration."""

    def __iter__(self: EpisodeSource) -> Iterator[Episode]:
        """Every episode in order."""
        return (self[number] for number in range(len(self)))


def first_readable(source: EpisodeSource, read: Callable[[int], Value], attempts: int = 20) -> Value:
    """What `read` gives of the first episode that can be read.

    Broken episodes are named, or skipped, when their turn comes.

    Args:
        source: The data source.
        read: Reads a part of the episode of a number: `source.vectors`, or `source.__getitem__` for all of it.
        attempts: How many episodes are tried, since a large set takes long.

    Raises:
        ValueError: If none of them can be read; says why the first cannot.
    """
    errors: list[ValueError] = []
    for number in range(min(len(source), attempts)):
        try:
            return read(number)
        except ValueError as error:
            errors.append(error)
    reason = errors[0] if errors else "there is none."
    raise ValueError(f"none of the first {len(errors)} episodes of {source.name!r} can be read: {reason}")


def window_slice(start: int, length: int | None, frames: int) -> slice:
    """The part of an episode's rows that a window is.

    Args:
        start: Its first frame.
        length: Number of its frames; None for all that follow.
        frames: Number of frames of the episode.

    Raises:
        ValueError: If it is empty or not within the episode.
    """
    stop = frames if length is None else start + length
    if not 0 <= start < stop <= frames:
        raise ValueError(f"a window must lie within the {frames} frames, got `start` {start}, `length` {length}.")
    return slice(start, stop)


def check_mixture(sources: Sequence[EpisodeSource]) -> None:
    """Refuse data sets that cannot be one: what their shapes do not show.

    A single camera may be called otherwise in another set, and components padded with zeros fit any.

    Raises:
        ValueError: If frames a second, cameras, names of the action's components or the derivation of actions differ; names
            two data sets and what differs.
    """
    for first, second in combinations(sources, 2):
        ours, theirs = _traits(first), _traits(second)
        for what in ours:
            if ours[what] != theirs[what] and not (what == "action components" and _fit(ours[what], theirs[what])):
                raise ValueError(
                    f"{first.name!r} and {second.name!r} cannot be mixed: their {what} are {ours[what]} and {theirs[what]}; "
                    "give sets that agree, or bring them to one form first."
                )


def _traits(source: EpisodeSource) -> dict[str, Any]:
    """What must be the same in all sets of a mixture."""
    return {
        "frames a second": source.fps,
        "cameras": source.cameras if sum(len(row) for row in source.cameras) > 1 else "a single one",
        "action components": source.component_names("action"),
        "action derivations": getattr(source, "action_derivation", "recorded"),
    }


def _fit(ours: list[str] | None, theirs: list[str] | None) -> bool:
    """Whether names of components are the same as far as they are known, and not of padding."""
    if ours is None or theirs is None:
        return True
    used = [pair for pair in zip(ours, theirs, strict=False) if not any(name.startswith("unused ") for name in pair)]
    return len(ours) == len(theirs) and all(a == b for a, b in used)


def sizes_digest(root: Path, files: Iterable[Path]) -> str:
    """Hash of the names and sizes of files, by which a set whose files were changed in place is another one."""
    sizes = [
        (os.path.relpath(path, root), path.stat().st_size if path.is_file() else None) for path in sorted(set(files))
    ]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


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
