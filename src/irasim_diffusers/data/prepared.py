"""Episodes with derived actions, fewer frames per second, or resized frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..actions import DERIVATIONS, derive_actions, integrate_actions
from ..pictures import resize_video
from .episode import CameraLayout, Episode, EpisodeSource, InOrder, first_readable, window_slice


@dataclass(frozen=True)
class PreparedEpisodes(InOrder):
    """A data source with derived actions, fewer frames per second, or resized frames.

    Args:
        source: Any data source.
        derivation: `"recorded"`, or how actions are computed from the states of successive frames; see
            `actions.derive_actions`.
        state_key: The state from which actions are derived; None selects the only one.
        frame_skip: Keep every n-th frame. Recorded actions are composed over the skipped frames: the last absolute target is
            used, planar motions are added, and pose motions are composed as rigid transformations.
        composition: Derivation of the recorded actions, which determines how they are composed: one of `actions.DERIVATIONS`
            except `"recorded"`. A derivation that is stored in the source takes precedence; without one, `composition` is
            required if `frame_skip` is greater than 1.
        action_dim: Number of action components after padding with zeros, as for RoboNet, whose robots use up to five
            components; None for no padding.
        frame_size: Height and width to which frames are resized; None keeps their size.
        all_phases: Keep the skipped frames as well, so that windows may start at any frame. Row t of `action` then leads
            from frame t to frame t + `frame_skip`, and a clip takes every `frame_skip`-th frame; see `LatentClips`.

    Raises:
        ValueError: If an argument or the frame rate of the source is invalid, the composition is missing, or actions are derived
            and no state can be read, `state_key` does not exist, or the state is ambiguous.
    """

    source: EpisodeSource
    derivation: str = "recorded"
    state_key: str | None = None
    frame_skip: int = 1
    composition: str | None = None
    action_dim: int | None = None
    frame_size: tuple[int, int] | None = None
    all_phases: bool = False

    def __post_init__(self) -> None:
        if self.derivation not in DERIVATIONS:
            raise ValueError(
                f"`derivation` (--action_derivation) must be one of {DERIVATIONS}, got {self.derivation!r}."
            )
        if self.composition not in (None, *DERIVATIONS[1:]):
            raise ValueError(
                f"`composition` (--action_composition) must be one of {DERIVATIONS[1:]}, got {self.composition!r}."
            )
        _check_count("`frame_skip`", self.frame_skip)
        if self.action_dim is not None:
            _check_count("`action_dim`", self.action_dim)
        if self.frame_size is not None:
            if len(self.frame_size) != 2:
                raise ValueError(f"`frame_size` must be height and width, got {self.frame_size}.")
            for size in self.frame_size:
                _check_count("each side of `frame_size`", size)
        if self.source.fps is not None and not (math.isfinite(self.source.fps) and self.source.fps > 0):
            raise ValueError(f"`fps` of {self.source.name!r} must be a positive finite number, got {self.source.fps}.")
        if self.derivation == "recorded":
            self._select_composition()
        else:
            self._select_state()

    def _select_composition(self) -> None:
        known = getattr(self.source, "action_derivation", "recorded")
        if known != "recorded":
            object.__setattr__(self, "composition", known)
        elif self.frame_skip > 1 and self.composition is None:
            raise ValueError(
                f"`composition` (--action_composition) is required with a `frame_skip` (--frame_skip) of {self.frame_skip}: pass "
                "absolute, relative_planar, relative_euler or relative_6d."
            )

    def _select_state(self) -> None:
        states = sorted(set(first_readable(self.source, self.source.vectors)) - {"action"})
        if not states:
            raise ValueError(
                f"`derivation` (--action_derivation) {self.derivation!r} requires states, but none of {self.source.name!r} is "
                "read: select columns of a table or LeRobotDataset with --state_columns, or use recorded actions."
            )
        key = self.state_key or (states[0] if len(states) == 1 else None)
        if key not in states:
            found = "none" if self.state_key is None else repr(self.state_key)
            raise ValueError(f"`state_key` must be one of {states} in {self.source.name!r}, got {found}.")
        object.__setattr__(self, "state_key", key)

    @property
    def name(self) -> str:
        """Path or name of the dataset, for messages."""
        return self.source.name

    @property
    def fps(self) -> float | None:
        """Frames per second after skipping."""
        return None if self.source.fps is None else self.source.fps / self.frame_skip

    @property
    def cameras(self) -> CameraLayout:
        """The cameras of the source."""
        return self.source.cameras

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the source and all changes to it."""
        changes = {name: getattr(self, name) for name in ("derivation", "state_key", "frame_skip", "action_dim")}
        changes["frame_size"] = self.frame_size
        changes["composition"] = self.composition if self.frame_skip > 1 else None  # without a skip it has no effect
        phases = {"all_phases": True} if self._step != self.frame_skip else {}
        return self.source.identity | {"prepared": changes | phases}

    @property
    def _step(self) -> int:
        """Distance between kept frames, in frames of the source."""
        return 1 if self.all_phases else self.frame_skip

    @property
    def action_derivation(self) -> str:
        """`derivation`, or for recorded actions `composition` if it is known; see `actions.DERIVATIONS`."""
        return (self.composition or "recorded") if self.derivation == "recorded" else self.derivation

    @property
    def action_units(self) -> list[str | None] | None:
        """Units of the components of recorded actions, if the source stores them."""
        units = getattr(self.source, "action_units", None) if self.derivation == "recorded" else None
        return None if units is None else units + [None] * ((self.action_dim or 0) - len(units))

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.source)

    def __getitem__(self, number: int) -> Episode:
        """Read one episode and prepare it.

        Raises:
            ValueError: If the episode is broken, its states or actions have too few components for the derivation, or `action_dim`
                is too small.
        """
        episode = self.source[number]
        vectors = self._prepare({"action": episode.actions, **episode.states}, number)
        return self._episode(episode.frames, vectors, episode.task)

    def window(self, number: int, start: int, length: int) -> Episode:
        """Read `length` kept frames from index `start`, with their actions and states.

        Raises:
            ValueError: If the episode is broken, its states or actions have too few components for the derivation, the window is
                empty or exceeds the episode, or `action_dim` is too small.
        """
        vectors = self.vectors(number)
        try:
            part = window_slice(start, length, len(vectors["action"]))
        except ValueError as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error
        episode = self.source.window(number, start * self._step, (length - 1) * self._step + 1)
        return self._episode(episode.frames, {key: value[part] for key, value in vectors.items()}, episode.task)

    def _episode(self, frames: np.ndarray, vectors: dict[str, np.ndarray], task: str) -> Episode:
        """Build an episode from frames of the source and prepared vectors."""
        frames = frames[:: self._step]
        if self.frame_size is not None:
            frames = resize_video(frames, self.frame_size)
        return Episode(frames, vectors.pop("action"), vectors, task)

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """Read and prepare `action` and the states of one episode.

        Raises:
            ValueError: If the episode is broken, its states or actions have too few components for the derivation, or `action_dim`
                is too small.
        """
        return self._prepare(self.source.vectors(number), number)

    def flags(self, number: int) -> dict[str, np.ndarray]:
        """Read the features (T, D) of one episode that are neither actions nor states.

        A bool is true if it is true in the kept frame or in one of the frames skipped after it.

        Raises:
            ValueError: If the source cannot read them.
        """
        flags = self.source.flags(number) if hasattr(self.source, "flags") else {}
        return {
            key: np.logical_or.reduceat(values, range(0, len(values), self._step), axis=0)
            if values.dtype == bool
            else values[:: self._step]
            for key, values in flags.items()
        }

    def latents(self, number: int) -> torch.Tensor | None:
        """Read the latents of the kept frames; None if the source has none.

        Raises:
            ValueError: If the source cannot read them.
        """
        latents = self.source.latents(number) if hasattr(self.source, "latents") else None
        return None if latents is None else latents[:: self._step]

    def component_names(self, key: str) -> list[str] | None:
        """Return the component names; None if unknown.

        Derived actions have the names of the state, except that the names for `relative_6d` are unknown. Padding components are
        named `unused <index>`.
        """
        if key != "action" or self.derivation == "recorded":
            names = self.source.component_names(key)
        else:
            names = self.source.component_names(str(self.state_key)) if self.derivation != "relative_6d" else None
        if key == "action" and names is not None and self.action_dim is not None:
            names = names + [f"unused {index}" for index in range(len(names), self.action_dim)]
        return names

    def _prepare(self, vectors: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """Return the vectors of the kept frames."""
        if self._step == self.frame_skip:
            return self._prepare_phase(vectors, number)
        length, skip = len(vectors["action"]), self.frame_skip
        phases = [
            self._prepare_phase({key: value[phase:] for key, value in vectors.items()}, number)
            for phase in range(min(skip, length))
        ]
        order = np.argsort(np.concatenate([np.arange(phase, length, skip) for phase in range(len(phases))]))
        return {key: np.concatenate([part[key] for part in phases])[order] for key in phases[0]}

    def _prepare_phase(self, vectors: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """Return every `frame_skip`-th row, with the action that leads to the next one."""
        kept = {key: value[:: self.frame_skip] for key, value in vectors.items()}
        try:
            if self.derivation != "recorded":
                states = kept[str(self.state_key)]
                after = np.concatenate([states, states[-1:]])  # the last action holds the pose
                kept["action"] = derive_actions(after, self.derivation)
            elif self.frame_skip > 1:
                kept["action"] = _compose(vectors["action"], self.frame_skip, str(self.composition))
        except ValueError as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error
        missing = (self.action_dim or 0) - kept["action"].shape[1]
        if missing < 0 < (self.action_dim or 0):
            raise ValueError(
                f"`action_dim` (--pad_actions_to) must be at least {kept['action'].shape[1]} for {self.name!r}, got "
                f"{self.action_dim}."
            )
        padding = ((0, 0), (0, max(missing, 0)))
        return kept | {"action": np.pad(kept["action"], padding).astype(np.float32)}


def frame_skip_for(source_fps: float | None, target_fps: float) -> int:
    """Compute the `frame_skip` that converts one frame rate to another.

    Args:
        source_fps: Frames per second of the data.
        target_fps: Requested frames per second.

    Raises:
        ValueError: If the frame rate of the data is unknown, or is not a multiple of `target_fps`.
    """
    if source_fps is None:
        raise ValueError(
            f"`target_fps` {target_fps:g} requires the frame rate of the data, which is unknown: pass `fps` (--fps)."
        )
    ratio = source_fps / target_fps if target_fps > 0 else 0.0
    skip = round(ratio) if math.isfinite(ratio) else 0
    if skip < 1 or abs(ratio - skip) > 1e-3:
        raise ValueError(
            f"`target_fps` must divide the {source_fps:g} frames per second of the data, got {target_fps:g}: every n-th frame "
            "is kept."
        )
    return skip


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def _compose(actions: np.ndarray, skip: int, composition: str) -> np.ndarray:
    """Compose the actions (T, A) of every `skip` frames into one; the last group may be shorter."""
    origin = np.zeros(actions.shape[1] - (3 if composition == "relative_6d" else 0))
    groups = (actions[start : start + skip] for start in range(0, len(actions), skip))
    ends = [integrate_actions(origin, group, composition)[-1] for group in groups]
    return np.stack([derive_actions(np.stack([origin, end]), composition)[0] for end in ends])
