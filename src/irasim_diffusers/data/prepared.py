"""Episodes brought to the actions and the rate that a model wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..actions import DERIVATIONS, derive_actions, integrate_actions
from .episode import CameraLayout, Episode, EpisodeSource, InOrder, first_readable, window_slice


@dataclass(frozen=True)
class PreparedEpisodes(InOrder):
    """A data source with other actions, or with fewer frames a second.

    Args:
        source: Any data source.
        derivation: `"recorded"`, or how actions come from the states of successive frames; see `actions.derive_actions`.
        state_key: The state they are derived from; None takes the only one.
        frame_skip: Keep every frame of that number. Recorded actions are composed over the frames between: absolute
            targets to the last, planar motions to their sum, motions of poses to one; `composition` says which they are.
        composition: What recorded actions are, one of `actions.DERIVATIONS` but `"recorded"`; needed to compose them.
        action_dim: Components after padding with zeros, as for RoboNet, whose robots move in fewer dimensions than five.
        frame_size: Height and width to which frames are resized; None leaves them.
        all_phases: Keep the frames between as well, for windows that begin at any of them: row t of `action` then leads from
            frame t to frame t + `frame_skip`, and only every `frame_skip`-th frame makes a clip; see `LatentClips`.

    Raises:
        ValueError: If the source does not have what is asked for.
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
        if self.derivation not in DERIVATIONS or self.composition not in (None, *DERIVATIONS[1:]):
            raise ValueError(
                f"`derivation` (--action_derivation) must be one of {DERIVATIONS} and `composition` (--action_composition) None "
                f"or another, got {self.derivation!r} and {self.composition!r}."
            )
        if self.frame_skip < 1:
            raise ValueError(f"`frame_skip` must be at least 1, got {self.frame_skip}.")
        if self.derivation == "recorded" and self.frame_skip > 1 and self.composition is None:
            raise ValueError(
                "`composition` (--action_composition) must say how recorded actions compose over skipped frames: absolute, relative_planar, "
                "relative_euler or relative_6d."
            )
        if self.derivation != "recorded":
            states = sorted(set(first_readable(self.source, self.source.vectors)) - {"action"})
            key = self.state_key or (states[0] if len(states) == 1 else None)
            if key not in states:
                raise ValueError(
                    f"`state_key` must be one of {states} in {self.source.name!r}, got {self.state_key!r}."
                )
            object.__setattr__(self, "state_key", key)

    @property
    def name(self) -> str:
        """Where the data lie."""
        return self.source.name

    @property
    def fps(self) -> float | None:
        """Frames a second that are kept."""
        return None if self.source.fps is None else self.source.fps / self.frame_skip

    @property
    def cameras(self) -> CameraLayout:
        """The cameras of the source."""
        return self.source.cameras

    @property
    def identity(self) -> dict[str, Any]:
        """That of the source with all that is changed."""
        changes = {name: getattr(self, name) for name in ("derivation", "state_key", "frame_skip", "action_dim")}
        changes["frame_size"] = self.frame_size
        changes["composition"] = self.composition if self.frame_skip > 1 else None  # else it changes nothing
        phases = {"all_phases": True} if self._step != self.frame_skip else {}
        return self.source.identity | {"prepared": changes | phases}

    @property
    def _step(self) -> int:
        """Distance of the frames that are kept."""
        return 1 if self.all_phases else self.frame_skip

    @property
    def action_derivation(self) -> str:
        """How actions came from states, here or in the source, or are said to by `composition`."""
        if self.derivation != "recorded":
            return self.derivation
        known = getattr(self.source, "action_derivation", "recorded")
        return self.composition if self.composition and known == "recorded" else known

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.source)

    def __getitem__(self, number: int) -> Episode:
        """One episode."""
        episode = self.source[number]
        vectors = self._prepare({"action": episode.actions, **episode.states}, number)
        return self._episode(episode.frames, vectors, episode.task)

    def window(self, number: int, start: int, length: int) -> Episode:
        """`length` of the frames that are kept from number `start` on, with what goes with them.

        Raises:
            ValueError: As for the episode, or if the window does not lie within it.
        """
        vectors = self.vectors(number)
        try:
            part = window_slice(start, length, len(vectors["action"]))
        except ValueError as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error
        episode = self.source.window(number, start * self._step, (length - 1) * self._step + 1)
        return self._episode(episode.frames, {key: value[part] for key, value in vectors.items()}, episode.task)

    def _episode(self, frames: np.ndarray, vectors: dict[str, np.ndarray], task: str) -> Episode:
        """Of frames of the source and vectors as they are wanted."""
        frames = frames[:: self._step]
        if self.frame_size is not None and frames.shape[1:3] != tuple(self.frame_size):
            frames = _resize(frames, self.frame_size)
        return Episode(frames, vectors.pop("action"), vectors, task)

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """`action` and states of one episode."""
        return self._prepare(self.source.vectors(number), number)

    def latents(self, number: int) -> torch.Tensor | None:
        """Latents that lie beside the video, of the frames that are kept."""
        latents = self.source.latents(number) if hasattr(self.source, "latents") else None
        return None if latents is None else latents[:: self._step]

    def component_names(self, key: str) -> list[str] | None:
        """Names of the components; those of derived actions where they are the state's own."""
        if key != "action" or self.derivation == "recorded":
            names = self.source.component_names(key)
        else:
            names = self.source.component_names(str(self.state_key)) if self.derivation != "relative_6d" else None
        if key == "action" and names is not None and self.action_dim is not None:
            names = names + [f"unused {index}" for index in range(len(names), self.action_dim)]
        return names

    def _prepare(self, vectors: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """The vectors of the frames that are kept."""
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
        """Every `frame_skip`-th row, from the first on, with the action that leads to the next."""
        kept = {key: value[:: self.frame_skip] for key, value in vectors.items()}
        try:
            if self.derivation != "recorded":
                states = kept[str(self.state_key)]
                after = np.concatenate([states, states[-1:]])  # the last action holds: it leads out of the episode
                kept["action"] = derive_actions(after, self.derivation)
            elif self.frame_skip > 1:
                kept["action"] = _compose(vectors["action"], self.frame_skip, str(self.composition))
        except ValueError as error:
            raise ValueError(f"episode {number} of {self.name!r}: {error}") from error
        missing = (self.action_dim or 0) - kept["action"].shape[1]
        if missing < 0 < (self.action_dim or 0):
            raise ValueError(
                f"`action_dim` (--pad_actions_to) must be at least {kept['action'].shape[1]} for {self.name!r}."
            )
        padding = ((0, 0), (0, max(missing, 0)))
        return kept | {"action": np.pad(kept["action"], padding).astype(np.float32)}


def frame_skip_for(source_fps: float | None, target_fps: float) -> int:
    """The `frame_skip` that brings frames to another rate.

    Args:
        source_fps: Frames a second of the data.
        target_fps: Frames a second that are wanted.

    Raises:
        ValueError: If the rate of the data is unknown, or no multiple of the other.
    """
    if source_fps is None:
        raise ValueError(f"the data record no frames a second to bring to {target_fps:g}: give `fps`.")
    skip = round(source_fps / target_fps) if target_fps > 0 else 0
    if skip < 1 or abs(source_fps / target_fps - skip) > 1e-3:
        raise ValueError(
            f"`target_fps` must divide the {source_fps:g} frames a second of the data, got {target_fps:g}: every n-th frame "
            "is kept."
        )
    return skip


def _resize(frames: np.ndarray, size: tuple[int, int], chunk_size: int = 64) -> np.ndarray:
    """Frames (T, H, W, 3), uint8, at another size, bilinear and antialiased."""
    parts = []
    for start in range(0, len(frames), chunk_size):
        pixels = torch.from_numpy(np.ascontiguousarray(frames[start : start + chunk_size])).permute(0, 3, 1, 2).float()
        resized = torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)
        parts.append(resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def _compose(actions: np.ndarray, skip: int, composition: str) -> np.ndarray:
    """Actions (T, A) over every `skip` frames as one each; the rest at the end is composed as far as it goes."""
    origin = np.zeros(actions.shape[1] - (3 if composition == "relative_6d" else 0))
    groups = (actions[start : start + skip] for start in range(0, len(actions), skip))
    ends = [integrate_actions(origin, group, composition)[-1] for group in groups]
    return np.stack([derive_actions(np.stack([origin, end]), composition)[0] for end in ends])
