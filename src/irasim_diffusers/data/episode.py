"""Episodes, the interface of data sources, and functions that all data sources share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

Value = TypeVar("Value")
CameraLayout: TypeAlias = tuple[tuple[str, ...], ...]
"""Names of the cameras whose images are tiled: rows from top to bottom, each from left to right."""


@dataclass(frozen=True)
class Episode:
    """One recorded episode of a robot.

    Row k of `actions` is the command given at frame k; it drives the step that ends in frame k + 1.
    """

    frames: np.ndarray  # (T, H, W, 3), uint8 RGB
    actions: np.ndarray  # (T, A), float32, units of the dataset
    states: dict[str, np.ndarray] = field(default_factory=dict)  # key -> (T, S), float32; others in `write_file`
    task: str = ""

    def __len__(self) -> int:
        return len(self.frames)


class EpisodeSource(Protocol):
    """Interface of data sources: numbered episodes, and properties known without decoding images."""

    @property
    def name(self) -> str:
        """Path or name of the dataset, for messages."""

    @property
    def fps(self) -> float | None:
        """Frames per second; None if unknown."""

    @property
    def cameras(self) -> CameraLayout:
        """The cameras whose images are tiled into a frame."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-serializable description that identifies the content; it changes if the content changes."""

    def __len__(self) -> int:
        """Number of episodes."""

    def __getitem__(self, number: int) -> Episode:
        """Read one episode; raise a ValueError that names the file or the episode if it is broken."""

    def __iter__(self) -> Iterator[Episode]:
        """Iterate over the episodes in order."""

    def window(self, number: int, start: int, length: int) -> Episode:
        """Read `length` frames of an episode from frame `start`; avoid decoding other frames."""

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """Read `action` and the states of one episode, each (T, D), float32."""

    def component_names(self, key: str) -> list[str] | None:
        """Names of the components of `action` or a state; None if unknown."""


class InOrder:
    """Mixin that iterates over the episodes of a data source."""

    def __iter__(self: EpisodeSource) -> Iterator[Episode]:
        """Iterate over the episodes in order."""
        return (self[number] for number in range(len(self)))


def first_readable(source: EpisodeSource, read: Callable[[int], Value], attempts: int = 20) -> Value:
    """Return the result of `read` for the first episode that can be read.

    Args:
        source: The data source.
        read: Function of the episode's index, such as `source.vectors` or `source.__getitem__`.
        attempts: Maximum number of episodes to try.

    Raises:
        ValueError: If the source is empty, or none of the tried episodes can be read; the message contains the first error.
    """
    errors: list[ValueError] = []
    for number in range(min(len(source), attempts)):
        try:
            return read(number)
        except ValueError as error:
            errors.append(error)
    if not errors:
        raise ValueError(f"{source.name!r} has no episode.")
    raise ValueError(f"none of the first {len(errors)} episodes of {source.name!r} can be read: {errors[0]}")


def window_slice(start: int, length: int | None, frames: int) -> slice:
    """Return the slice of an episode's rows that a window covers.

    Args:
        start: First frame of the window.
        length: Number of frames in the window; None for all frames from `start`.
        frames: Number of frames in the episode.

    Raises:
        ValueError: If the window is empty or exceeds the episode.
    """
    stop = frames if length is None else start + length
    if not 0 <= start < stop <= frames:
        shown = "" if length is None else f", `length` {length}"
        raise ValueError(
            f"a window must be within the {frames} frames of its episode and not empty, got `start` {start}{shown}."
        )
    return slice(start, stop)


def check_max_episodes(max_episodes: int | None) -> None:
    """Raise ValueError if the maximum number of episodes is not positive; None is accepted."""
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"`max_episodes` (--max_train_episodes) must be at least 1, got {max_episodes}.")


RESIZE = "resize all with `height` (--height) and `width` (--width), or skip it with `skip_broken` (--skip_broken)"


def check_equal_size(frame_size: tuple[int, ...], frames: np.ndarray, name: str, remedy: str = RESIZE) -> None:
    """Check that frames (T, H, W, 3) of an episode have the size of earlier ones.

    Args:
        frame_size: Height and width of earlier frames.
        frames: Frames of the episode.
        name: Name of the episode, for the message.
        remedy: What the user can do, for the message.

    Raises:
        ValueError: If the sizes differ.
    """
    wanted, size = ("x".join(map(str, each)) for each in (frame_size, frames.shape[1:3]))
    if size != wanted:
        raise ValueError(
            f"frames of {name} must be {wanted} (height x width) like those of earlier episodes, got {size}: {remedy}."
        )


def check_mixture(sources: Sequence[EpisodeSource]) -> None:
    """Check that datasets can be mixed, apart from array shapes, which are checked later.

    The cameras of datasets with a single camera may have different names. A padding component matches any component, and
    unknown component names match any names.

    Raises:
        ValueError: If frame rates, cameras, names of the action components or action derivations differ; the message names two
            datasets and their difference.
    """
    for first, second in combinations(sources, 2):
        ours, theirs = _traits(first), _traits(second)
        for what in ours:
            if ours[what] != theirs[what] and not (what == "action components" and _fit(ours[what], theirs[what])):
                raise ValueError(
                    f"{first.name!r} and {second.name!r} cannot be mixed: their {what} are {ours[what]} and {theirs[what]}; "
                    "convert one of them, or use only one of them."
                )


def _traits(source: EpisodeSource) -> dict[str, Any]:
    """Return the properties that all datasets of a mixture must share."""
    return {
        "frames per second": "unknown" if source.fps is None else source.fps,
        "cameras": source.cameras if sum(len(row) for row in source.cameras) > 1 else "single",
        "action components": source.component_names("action"),
        "action derivations": getattr(source, "action_derivation", "recorded"),
    }


def _fit(ours: list[str] | None, theirs: list[str] | None) -> bool:
    """Return whether the known names of components agree in number and, except for padding, in content."""
    if ours is None or theirs is None:
        return True
    used = [pair for pair in zip(ours, theirs, strict=False) if not any(name.startswith("unused ") for name in pair)]
    return len(ours) == len(theirs) and all(a == b for a, b in used)


def first_task(tasks: Any) -> str:
    """Return the first task of an episode, or "".

    Args:
        tasks: A string, a list of strings, or None.

    Raises:
        ValueError: If the first task is not a string.
    """
    task = "" if not tasks else tasks if isinstance(tasks, str) else tasks[0] if isinstance(tasks, list) else tasks
    if not isinstance(task, str):
        raise ValueError(
            f"the task must be a string, got {task!r:.60}: fix the metadata, or set it to an empty string."
        )
    return task


def camera_layout(cameras: str | Sequence[str] | Sequence[Sequence[str]]) -> CameraLayout:
    """Return the layout of one camera, several stacked cameras, or rows of cameras.

    A row may be written `left,right`.
    """
    rows = [cameras] if isinstance(cameras, str) else cameras
    return tuple(tuple(row.split(",")) if isinstance(row, str) else tuple(row) for row in rows)


def format_cameras(layout: Sequence[Sequence[str]]) -> str:
    """Format a layout as a value of `--cameras`: rows separated by spaces, cameras by commas."""
    return " ".join(",".join(row) for row in layout)


def tile(layout: CameraLayout, views: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tile the videos (T, H, W, 3) of several cameras into one video, as given by the layout.

    Raises:
        ValueError: If the videos have different lengths, or their images do not form a rectangle.
    """
    sizes = {name: views[name].shape for row in layout for name in row}
    if len({shape[0] for shape in sizes.values()}) > 1:
        lengths = ", ".join(f"{name} {shape[0]}" for name, shape in sizes.items())
        raise ValueError(
            f"cameras must have the same number of frames, got {lengths}: remove the episode, or select one camera."
        )
    rows = [[views[name] for name in row] for row in layout]
    heights = [{view.shape[1] for view in row} for row in rows]
    widths = {sum(view.shape[2] for view in row) for row in rows}
    if any(len(height) > 1 for height in heights) or len(widths) > 1:
        shapes = ", ".join(f"{name} {shape[1]}x{shape[2]}" for name, shape in sizes.items())
        raise ValueError(
            f"images of the cameras must form a rectangle in the layout {format_cameras(layout)!r}, got {shapes} (height x width): "
            "change `cameras` (--cameras)."
        )
    return np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)
