"""Candidate scoring, the ensemble guard, and the resulting plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..rollout import RolloutState, WorldModel, roll

Objective = Callable[[torch.Tensor], torch.Tensor]
"""Maps frames (B, n, 3, H, W) to scores (B, n), or latents (B, C, n, h, w) if its attribute `needs_pixels` is False."""

REDUCTIONS = ("last", "mean", "max")
SEED_STRIDE = 1_000_003  # difference between successive seeds of one model in a guard


class NoPlanError(ValueError):
    """Raised if no candidate has a finite score: scores are NaN or infinite, or the guard rejects all."""


@dataclass(frozen=True)
class Disagreement:
    """Guard against plans that exploit model errors: members of an ensemble must agree on the score.

    The score becomes `mean - weight * std` over the members; for two members and weight 1 this is the lower score.

    Args:
        models: Other world models with the same action space and frame size. They start from the decoded history frames.
        num_seeds: Number of noise seeds per model.
        weight: Weight of the standard deviation.
        limit: Maximum standard deviation at which a candidate is accepted; None for no limit. A planner raises `NoPlanError` if
            every candidate exceeds it.

    Raises:
        ValueError: If there is only one member, or a number is out of range.
    """

    models: Sequence[WorldModel] = ()
    num_seeds: int = 1
    weight: float = 1.0
    limit: float | None = None

    def __post_init__(self) -> None:
        require(self.num_seeds >= 1, "num_seeds", "at least 1", self.num_seeds)
        require(math.isfinite(self.weight) and self.weight >= 0, "weight", "finite and at least 0", self.weight)
        require(self.limit is None or self.limit >= 0, "limit", "None or at least 0", self.limit)
        if not self.models and self.num_seeds == 1:
            raise ValueError("the guard requires at least two members: pass `models`, or `num_seeds` > 1.")

    @torch.no_grad()
    def members(self, model: WorldModel, state: RolloutState) -> list[tuple[WorldModel, RolloutState]]:
        """Return the members, each a model and its state; the first member is the planner's model."""
        states = [(model, state)]
        if self.models:
            frames = model.decode(state.latents)
            states += [(other, other.start(frames, state.seeds)) for other in self.models]
        return [
            (member, dataclasses.replace(own, seeds=tuple(seed + index * SEED_STRIDE for seed in own.seeds)))
            for member, own in states
            for index in range(self.num_seeds)
        ]

    def combine(self, scores: torch.Tensor) -> torch.Tensor:
        """Combine the scores (M, K) of the members into guarded scores (K,)."""
        spread = scores.std(dim=0, correction=0)
        guarded = scores.mean(dim=0) - self.weight * spread
        return guarded if self.limit is None else guarded.masked_fill(spread > self.limit, -math.inf)


@dataclass(frozen=True)
class Scoring:
    """How a planner scores candidates.

    Args:
        reduction: How the scores of the frames are reduced to the score of a sequence: `"last"` (as in the paper; only the last
            frame is decoded), `"mean"` or `"max"`.
        batch_size: Maximum number of candidates that are predicted together; it bounds the memory and changes the result by
            rounding at most.
        chunk_length: Number of actions per chunk; None for the model's maximum.
        guard: Guard against plans that exploit model errors; None for no guard.
        sampling: Keyword arguments of `model.advance`, such as `{"num_inference_steps": 5}`.

    Raises:
        ValueError: If `reduction` or `batch_size` is invalid.
    """

    reduction: str = "last"
    batch_size: int = 64
    chunk_length: int | None = None
    guard: Disagreement | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.reduction in REDUCTIONS, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(self.reduction))
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)

    @torch.no_grad()
    def __call__(
        self, model: WorldModel, state: RolloutState, actions: torch.Tensor, objective: Objective
    ) -> torch.Tensor:
        """Score candidates (K, n, A), raw units, `batch_size` at a time; return (K,) on the CPU."""
        parts = actions.split(self.batch_size)
        return torch.cat([self.score(model, state, part, objective).cpu() for part in parts])

    def score(
        self, model: WorldModel, state: RolloutState, actions: torch.Tensor, objective: Objective
    ) -> torch.Tensor:
        """Score candidates (K, n, A) in one batch; gradients flow to the actions unless they are disabled."""
        if self.guard is None:
            return self._score(model, state, actions, objective)
        members = self.guard.members(model, state)
        return self.guard.combine(torch.stack([self._score(*member, actions, objective) for member in members]))

    def _score(
        self, model: WorldModel, state: RolloutState, actions: torch.Tensor, objective: Objective
    ) -> torch.Tensor:
        chunks = roll(model, state.repeat(len(actions)), actions, self.chunk_length, **self.sampling)
        if self.reduction == "last":
            for _, latents in chunks:
                last = latents[:, :, -1:]
            return frame_scores(model, last, objective)[:, 0]
        values = torch.cat([frame_scores(model, latents, objective) for _, latents in chunks], dim=1)
        return values.mean(1) if self.reduction == "mean" else values.amax(1)


@dataclass(frozen=True)
class Plan:
    """Result of a planner. Tensors are on the CPU, actions in raw units."""

    actions: torch.Tensor  # (n, A), the best sequence
    score: float
    candidates: torch.Tensor  # (K, n, A), every scored sequence; for `Gradient`, the best iterate of each plan
    scores: torch.Tensor  # (K,), not finite where a candidate was rejected
    model: WorldModel = field(repr=False)
    state: RolloutState = field(repr=False)
    scoring: Scoring = field(repr=False)

    def top(self, k: int) -> torch.Tensor:
        """Return the k best candidates (k, n, A), best first; fewer if fewer have finite scores."""
        order = torch.where(self.scores.isfinite(), self.scores, -math.inf).argsort(descending=True, stable=True)
        return self.candidates[order[: min(k, int(self.scores.isfinite().sum()))]]

    @torch.no_grad()
    def latents(self) -> torch.Tensor:
        """Predict the latents (1, C, n, h, w) of the plan."""
        chunks = roll(self.model, self.state, self.actions[None], self.scoring.chunk_length, **self.scoring.sampling)
        return torch.cat([latents for _, latents in chunks], dim=2)

    @torch.no_grad()
    def frames(self) -> torch.Tensor:
        """Predict the frames (n, 3, H, W) of the plan, in [0, 1]."""
        return self.model.decode(self.latents())[0]


def best_plan(
    model: WorldModel, state: RolloutState, scoring: Scoring, candidates: torch.Tensor, scores: torch.Tensor
) -> Plan:
    """Return the highest-scoring candidate with a finite score; ties resolve to the first.

    Raises:
        NoPlanError: If no score is finite.
    """
    if not scores.isfinite().any():
        raise NoPlanError(
            f"none of the {len(scores)} candidates has a finite score: the objective or the prediction is NaN or infinite, or "
            "the guard's `limit` rejects every candidate."
        )
    index = int(torch.where(scores.isfinite(), scores, -math.inf).argmax())
    return Plan(candidates[index], float(scores[index]), candidates, scores, model, state, scoring)


def frame_scores(model: WorldModel, latents: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Score the frames of latents (B, C, n, h, w); return (B, n).

    Frames are decoded only if the objective needs them.

    Raises:
        ValueError: If the objective does not return a tensor (B, n).
    """
    scores = objective(model.decode(latents) if getattr(objective, "needs_pixels", True) else latents)
    expected = (latents.shape[0], latents.shape[2])
    if not torch.is_tensor(scores) or tuple(scores.shape) != expected:
        found = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        raise ValueError(f"`objective` must return one score per frame, a tensor {expected}, got {found}.")
    return scores.float()


@torch.no_grad()
def check_objective(model: WorldModel, state: RolloutState, objective: Objective) -> None:
    """Check the state, and the objective on the last history frame, before anything is predicted.

    Raises:
        ValueError: If the state does not have one row, the objective is for frames of a different size, or its score has the
            wrong shape or is not finite.
    """
    if len(state) != 1:
        raise ValueError(f"`state` must have one row, got {len(state)}: plan for each `state.select([row])`.")
    size = getattr(objective, "frame_size", None)
    if size is not None and tuple(size) != tuple(model.frame_size):
        raise ValueError(
            f"`objective` must be for frames of {model.frame_size[0]}x{model.frame_size[1]} (height x width), got one for "
            f"{size[0]}x{size[1]}: resize the goal image, or use another reward."
        )
    score = frame_scores(model, state.latents[:, :, -1:], objective)
    if not torch.isfinite(score).all():
        raise ValueError(f"`objective` must return finite scores, got {score.item()} for the current frame.")


def require(valid: bool, name: str, wanted: str, found: Any) -> None:
    """Raise ValueError unless an argument is valid."""
    if not valid:
        raise ValueError(f"`{name}` must be {wanted}, got {found}.")
