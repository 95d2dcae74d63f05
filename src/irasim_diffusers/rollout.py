"""Rollouts: their state, the protocol of world models, and the chaining of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from .action_space import ActionSpace


@dataclass(frozen=True)
class RolloutState:
    """State of B rollouts that are predicted together; every operation returns a new state.

    The noise of row b at step t depends on `(seeds[b], t)` only, so that a row is the same alone and in a batch.

    Args:
        latents: Clean history (B, C, h, H, W), scaled latents.
        seeds: B non-negative seeds.
        step: Number of frames predicted so far (B,), int64, on the CPU.
        memory: What the model keeps from chunk to chunk in addition to the history, by name: tensors (B, ...). A row of zeros is
            empty, as at the start.

    Raises:
        ValueError: If the latents do not have 5 dimensions, the batch sizes differ, or a seed is negative.
    """

    latents: torch.Tensor
    seeds: tuple[int, ...]
    step: torch.Tensor
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(self.latents), len(self.seeds), len(self.step), *map(len, self.memory.values())}
        if self.latents.ndim != 5 or len(lengths) > 1:
            raise ValueError(
                "`latents` must be (B, C, h, H, W), with B entries in `seeds`, in `step` and in the tensors of `memory`, got "
                f"{tuple(self.latents.shape)}, {len(self.seeds)}, {len(self.step)} and {[*map(len, self.memory.values())]}."
            )
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"`seeds` must be non-negative integers, got {list(self.seeds)}.")

    @classmethod
    def first(cls, latents: torch.Tensor, seeds: Sequence[int]) -> RolloutState:
        """Return the initial state of rollouts from the latents (B, C, h, H, W) of their histories."""
        return cls(latents, tuple(int(seed) for seed in seeds), torch.zeros(len(latents), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.seeds)

    def repeat(self, k: int) -> RolloutState:
        """Repeat each row `k` times, consecutively, to B * k rows. Copies share the seed and thus the noise.

        Raises:
            ValueError: If `k` is less than 1.
        """
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        return self.select([row for row in range(len(self)) for _ in range(k)])

    def select(self, rows: Sequence[int]) -> RolloutState:
        """Take rows in the given order; a row may occur more than once.

        Raises:
            ValueError: If there are no rows, or a row is out of range.
        """
        rows = self._check_rows(rows)
        memory = {name: tensor[rows] for name, tensor in self.memory.items()}
        return RolloutState(self.latents[rows], tuple(self.seeds[row] for row in rows), self.step[rows], memory)

    def put(self, rows: Sequence[int], other: RolloutState) -> RolloutState:
        """Replace rows with the rows of another state, as in a partial reset.

        Args:
            rows: Distinct rows of this state.
            other: State with as many rows and the same shape of latents.

        Raises:
            ValueError: If rows repeat or are out of range, their number is not that of `other`, or the shapes of the latents
                differ.
        """
        rows = self._check_rows(rows)
        if len(set(rows)) != len(rows) or len(rows) != len(other):
            raise ValueError(f"`rows` must be {len(other)} distinct rows, one for each row of `other`, got {rows}.")
        if self.latents.shape[1:] != other.latents.shape[1:]:
            raise ValueError(
                f"`other` must have latents of shape {tuple(self.latents.shape[1:])} per row, got "
                f"{tuple(other.latents.shape[1:])}: start it from the same number of history frames."
            )
        kept = [row for row in range(len(self)) if row not in rows]
        state = concatenate([self.select(kept), other.to(self.latents.device)] if kept else [other])
        places = torch.tensor([*kept, *rows]).argsort().tolist()
        return state.select(places)

    def append(
        self, future: torch.Tensor, num_history_frames: int, memory: Mapping[str, torch.Tensor] | None = None
    ) -> RolloutState:
        """Return the state after predicted latents (B, C, n, H, W), with the memory of the model, if any.

        The history of the new state is the last `num_history_frames` frames, old and predicted.
        """
        latents = torch.cat([self.latents.to(future), future], dim=2)[:, :, -num_history_frames:]
        return RolloutState(latents, self.seeds, self.step + future.shape[2], memory or {})

    def to(self, device: torch.device | str) -> RolloutState:
        """Return the state with its latents and its memory on a device."""
        memory = {name: tensor.to(device) for name, tensor in self.memory.items()}
        return RolloutState(self.latents.to(device), self.seeds, self.step, memory)

    def generators(self, offset: int = 0) -> list[torch.Generator]:
        """Return one seeded CPU generator per row, for the frame `offset` steps after the next frame."""
        places = zip(self.seeds, (self.step + offset).tolist(), strict=True)
        states = [np.random.SeedSequence([seed, step]).generate_state(1)[0] for seed, step in places]
        return [torch.Generator().manual_seed(int(state)) for state in states]

    def _check_rows(self, rows: Sequence[int]) -> list[int]:
        rows = [int(row) for row in rows]
        if not rows or not all(0 <= row < len(self) for row in rows):
            raise ValueError(f"`rows` must be at least one row in [0, {len(self) - 1}], got {rows}.")
        return rows


class WorldModel(Protocol):
    """Protocol of models that predict frames from action sequences, such as a pipeline or a simulator."""

    @property
    def action_space(self) -> ActionSpace:
        """Space of the actions."""
        ...

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        ...

    @property
    def fps(self) -> float | None:
        """Frames per second of the model, if known."""
        ...

    @property
    def max_chunk(self) -> int:
        """Maximum number of actions per call of `advance`."""
        ...

    def start(self, frames: Any, seeds: Sequence[int]) -> RolloutState:
        """Start one rollout per seed, from a single history or from one history per seed."""
        ...

    def advance(
        self, state: RolloutState, actions: torch.Tensor, **sampling: Any
    ) -> tuple[RolloutState, torch.Tensor]:
        """Return the state after actions (B, n, A), raw units, and the latents (B, C, n, h, w) of the chunk."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, n, h, w) to frames (B, n, 3, H, W) in [0, 1]."""
        ...


def roll(
    model: WorldModel, state: RolloutState, actions: torch.Tensor, chunk_length: int | None = None, **sampling: Any
) -> Iterator[tuple[RolloutState, torch.Tensor]]:
    """Predict any number of frames chunk by chunk (paper, section 4.1).

    Memory is constant under `torch.no_grad`.

    Args:
        model: The world model.
        state: The state to start from, B rows.
        actions: Actions (B, n, A) in raw units.
        chunk_length: Actions per chunk; the last chunk may be shorter. None for `model.max_chunk`.
        sampling: Passed to `model.advance`.

    Returns:
        An iterator over the state after each chunk and the latents (B, C, m, h, w) of the chunk.

    Raises:
        ValueError: Immediately, if `chunk_length` is out of range, or `actions` is not (B, n, A) with one sequence per row of the
            state.
    """
    length = model.max_chunk if chunk_length is None else chunk_length
    if not 1 <= length <= model.max_chunk:
        raise ValueError(f"`chunk_length` must be in [1, {model.max_chunk}] for this model, got {length}.")
    if actions.ndim != 3 or len(actions) != len(state):
        raise ValueError(
            f"`actions` must be (B, n, A), one sequence for each of the {len(state)} rows of the state, got "
            f"{tuple(actions.shape)}: add a missing batch dimension, or repeat the state for several candidates."
        )

    def chunks(state: RolloutState) -> Iterator[tuple[RolloutState, torch.Tensor]]:
        for chunk in actions.split(length, dim=1):
            state, latents = model.advance(state, chunk, **sampling)
            yield state, latents

    return chunks(state)


def concatenate(states: list[RolloutState]) -> RolloutState:
    """Concatenate the rows of several states, whose latents have the same shape per row."""
    latents, steps = torch.cat([state.latents for state in states]), torch.cat([state.step for state in states])
    templates = {name: tensor for state in states for name, tensor in state.memory.items()}
    memory = {
        name: torch.cat([state.memory.get(name, tensor.new_zeros(len(state), *tensor.shape[1:])) for state in states])
        for name, tensor in templates.items()
    }
    return RolloutState(latents, tuple(seed for state in states for seed in state.seeds), steps, memory)
