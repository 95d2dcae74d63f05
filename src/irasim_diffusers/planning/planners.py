"""Planners: ranking, cross-entropy method, MPPI, gradient ascent, and candidates on straight lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..action_space import ActionSpace
from ..rollout import RolloutState, WorldModel
from .scoring import Objective, Plan, Scoring, best_plan, check_objective, require


@dataclass(frozen=True)
class Rank:
    """Choose the best of given action sequences, such as K samples of a policy (paper, section 4.3).

    Args:
        spread: Factor that scales the distance of the candidates from their mean; 1 leaves them unchanged.
        scoring: How candidates are scored.

    Raises:
        ValueError: If a value is out of range.
    """

    spread: float = 1.0
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        require(math.isfinite(self.spread) and self.spread >= 0, "spread", "finite and at least 0", self.spread)

    def __call__(self, model: WorldModel, state: RolloutState, objective: Objective, init: Any = None) -> Plan:
        """Rank the sequences `init` (K, n, A), raw units.

        Raises:
            ValueError: Before any prediction, if the state, the sequences, the objective or `scoring.chunk_length` is invalid.
            NoPlanError: If no sequence has a finite score.
        """
        if init is None:
            raise ValueError("`init` must be the candidates (K, n, A) to rank, got None.")
        candidates = _prepare(model.action_space, init)
        check_objective(model, state, objective)
        if self.spread != 1:
            space = model.action_space
            normalized = space.normalise(candidates)
            center = normalized.mean(0)
            candidates = _raw(space, center + self.spread * (normalized - center))
        return best_plan(model, state, self.scoring, candidates, self.scoring(model, state, candidates, objective))


@dataclass(frozen=True)
class CEM:
    """Cross-entropy method: sample around a plan, and move the distribution toward the best candidates.

    Args:
        horizon: Number of actions of a plan.
        num_candidates: Number of candidates per iteration, including the current mean.
        num_iterations: Number of iterations.
        num_elites: Number of best candidates that define the next distribution.
        std: Initial standard deviation in normalized units.
        min_std: Smallest standard deviation in normalized units.
        num_knots: Number of time points at which offsets are sampled, with linear interpolation between them; None for every
            action.
        seed: Seed of the candidates.
        scoring: How candidates are scored.

    Raises:
        ValueError: If a value is out of range.
    """

    horizon: int
    num_candidates: int = 64
    num_iterations: int = 5
    num_elites: int = 8
    std: float = 1.0
    min_std: float = 0.02
    num_knots: int | None = None
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        _check_search(self)
        require(
            1 <= self.num_elites <= self.num_candidates,
            "num_elites",
            f"in [1, {self.num_candidates}]",
            self.num_elites,
        )
        require(0 <= self.min_std <= self.std, "min_std", f"in [0, {self.std:g}]", self.min_std)

    def __call__(self, model: WorldModel, state: RolloutState, objective: Objective, init: Any = None) -> Plan:
        """Plan from one state.

        Args:
            model: The world model.
            state: A state with one row.
            objective: Function that scores frames or latents; higher is better.
            init: Plan (n, A) to start from, or several (K, n, A), of which the best is taken; raw units. Actions outside the
                bounds are clipped if `ActionSpace.prepare` accepts them. None for no motion; components that are not motions,
                such as absolute targets, are in the middle of their bounds or, without two finite bounds, at `offset`.

        Returns:
            The best of all plans that were scored.

        Raises:
            ValueError: Before any prediction, if the state, the plans, the objective or `scoring.chunk_length` is invalid.
            NoPlanError: If no candidate, or none of several plans `init`, has a finite score.
        """

        def update(offsets: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            elites = offsets[scores.argsort(descending=True, stable=True)[: self.num_elites]]
            return elites.mean(0), elites.std(0, correction=0).clamp(min=self.min_std)

        return _search(self, model, state, objective, init, update)


@dataclass(frozen=True)
class MPPI:
    """Model predictive path integral: average candidates around a plan, weighted by their scores.

    Args:
        horizon: Number of actions of a plan.
        num_candidates: Number of candidates per iteration, including the current mean.
        num_iterations: Number of iterations.
        temperature: Temperature of the softmax over scores, in units of their standard deviation.
        std: Standard deviation in normalized units.
        num_knots: See `CEM`.
        seed: Seed of the candidates.
        scoring: How candidates are scored.

    Raises:
        ValueError: If a value is out of range.
    """

    horizon: int
    num_candidates: int = 64
    num_iterations: int = 5
    temperature: float = 0.3
    std: float = 1.0
    num_knots: int | None = None
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        _check_search(self)
        require(
            math.isfinite(self.temperature) and self.temperature > 0,
            "temperature",
            "positive and finite",
            self.temperature,
        )

    def __call__(self, model: WorldModel, state: RolloutState, objective: Objective, init: Any = None) -> Plan:
        """Plan from one state; see `CEM.__call__`."""

        def update(offsets: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = self.temperature * scores.std(correction=0).clamp(min=1e-12)
            weights = torch.softmax((scores - scores.max()) / scale, dim=0)
            return torch.einsum("k,kma->ma", weights, offsets), torch.full_like(offsets[0], self.std)

        return _search(self, model, state, objective, init, update)


@dataclass(frozen=True)
class Gradient:
    """Gradient ascent on the actions through the model, with Adam.

    If `init` contains samples of a policy, this is GPC-RANK+OPT (https://arxiv.org/abs/2502.00622): each sample is improved,
    and the best one is returned.

    Args:
        horizon: Number of actions of a plan.
        num_iterations: Number of gradient steps.
        learning_rate: Step size in normalized units.
        scoring: How candidates are scored. Memory grows with the horizon, because gradients need every step.

    Raises:
        ValueError: If a value is out of range.
    """

    horizon: int
    num_iterations: int = 10
    learning_rate: float = 0.1
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        require(self.horizon >= 1, "horizon", "at least 1", self.horizon)
        require(self.num_iterations >= 0, "num_iterations", "at least 0", self.num_iterations)
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "learning_rate",
            "positive and finite",
            self.learning_rate,
        )

    def __call__(self, model: WorldModel, state: RolloutState, objective: Objective, init: Any = None) -> Plan:
        """Improve each plan of `init` and return the best; see `CEM.__call__`.

        Raises:
            ValueError: Before any prediction, if the state, the plans, the objective or `scoring.chunk_length` is invalid; after
                the first prediction, if the model or the objective is not differentiable.
            NoPlanError: If no candidate has a finite score.
        """
        candidates = _initial(model.action_space, init, self.horizon)
        check_objective(model, state, objective)
        parts = [self._ascend(model, state, part, objective) for part in candidates.split(self.scoring.batch_size)]
        plans, scores = (torch.cat(values) for values in zip(*parts, strict=True))
        return best_plan(model, state, self.scoring, plans, scores)

    def _ascend(
        self, model: WorldModel, state: RolloutState, candidates: torch.Tensor, objective: Objective
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best iterate (K, n, A) of each candidate and its score (K,)."""
        space = model.action_space
        low, high = _bounds(space, candidates)
        point = space.normalise(candidates).clamp(low, high).requires_grad_()
        optimizer = torch.optim.Adam([point], lr=self.learning_rate)
        best, best_scores = candidates, torch.full((len(candidates),), -math.inf)
        for iteration in range(self.num_iterations + 1):
            last = iteration == self.num_iterations
            with torch.set_grad_enabled(not last):
                raw = _raw(space, point)
                scores = self.scoring.score(model, state, raw, objective)
            values = scores.detach().cpu()
            better = values.isfinite() & (values > best_scores)
            best = torch.where(better[:, None, None], raw.detach(), best)
            best_scores = torch.where(better, values, best_scores)
            if last:
                break
            if not scores.requires_grad:
                raise ValueError(
                    "`model` and `objective` must be differentiable for the gradient planner, got scores without gradients: use "
                    "CEM or MPPI."
                )
            usable = torch.where(scores.isfinite(), scores, torch.zeros_like(scores))
            point.grad = torch.autograd.grad(-usable.sum(), point)[0].nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            with torch.no_grad():
                point.copy_(point.clamp(low, high))
        return best, best_scores


def straight_lines(
    space: ActionSpace,
    horizon: int,
    radius: float,
    num_candidates: int = 50,
    start: Any = None,
    components: Sequence[int] = (0, 1),
    seed: int = 0,
) -> torch.Tensor:
    """Sample straight paths to points on a circle or sphere around the end effector (paper, appendix 12).

    Args:
        space: The action space.
        horizon: Number of actions of a path.
        radius: Distance that a path covers, in the raw units of `components`.
        num_candidates: Number of paths.
        start: Action (A,) that holds the current position; required for absolute targets. For relative actions, it gives the
            components that are not motions, such as the gripper opening.
        components: The position components: two for a circle, three for a sphere.
        seed: Seed of the points.

    Returns:
        Candidates (K, n, A) for `Rank`, raw units, within the bounds.

    Raises:
        ValueError: If a value is out of range, or `start` is invalid, or is missing for absolute targets.
    """
    require(horizon >= 1, "horizon", "at least 1", horizon)
    require(num_candidates >= 1, "num_candidates", "at least 1", num_candidates)
    require(math.isfinite(radius) and radius > 0, "radius", "positive and finite", radius)
    places = list(components)
    valid = bool(places) and len(set(places)) == len(places) and all(0 <= place < len(space) for place in places)
    require(valid, "components", f"one or more different indices in [0, {len(space) - 1}]", places)
    if space.has_targets and start is None:
        raise ValueError("`start` must be the current position (A,) for absolute targets, got None.")
    try:
        held = space.hold(torch.zeros(len(space)) if start is None else space.prepare([start])[0, 0])
    except ValueError as error:
        raise ValueError(f"`start` is invalid: {error}") from error
    directions = torch.randn(num_candidates, 1, len(places), generator=torch.Generator().manual_seed(seed))
    directions = directions / directions.norm(dim=-1, keepdim=True)
    steps = torch.arange(1, horizon + 1)[:, None] if space.has_targets else torch.ones(horizon, 1)
    paths = held.repeat(num_candidates, horizon, 1)
    paths[..., places] = held[places] + directions * steps * (radius / horizon)
    return space.clip(paths)


def _search(
    planner: CEM | MPPI,
    model: WorldModel,
    state: RolloutState,
    objective: Objective,
    init: Any,
    update: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Plan:
    """Search with sampled offsets (K, m, A) at the knots.

    `update` computes the next mean and standard deviation of the offsets from the current offsets and their scores.
    """
    space, scoring = model.action_space, planner.scoring
    plans = _initial(space, init, planner.horizon)
    check_objective(model, state, objective)
    scored = [(plans, scoring(model, state, plans, objective))]
    center = space.normalise(best_plan(model, state, scoring, *scored[0]).actions if len(plans) > 1 else plans[0])
    weights, places = _knots(planner.horizon, planner.num_knots or planner.horizon)
    low, high = _bounds(space, center)
    generator = torch.Generator().manual_seed(planner.seed)
    mean = torch.zeros(len(places), len(space))
    std = torch.full_like(mean, planner.std)
    for _ in range(planner.num_iterations):
        noise = torch.randn(planner.num_candidates, *mean.shape, generator=generator)
        noise[0] = 0
        offsets = torch.clamp(center[places] + mean + std * noise, low, high) - center[places]
        candidates = _raw(space, center + torch.einsum("nm,kma->kna", weights, offsets))
        scores = scoring(model, state, candidates, objective)
        scored.append((candidates, scores))
        usable = scores.isfinite()
        if usable.any():
            mean, std = update(offsets[usable], scores[usable])
    final = _raw(space, center + weights @ mean)[None]
    scored.append((final, scoring(model, state, final, objective)))
    candidates, scores = (torch.cat(values) for values in zip(*scored, strict=True))
    return best_plan(model, state, scoring, candidates, scores)


def _initial(space: ActionSpace, init: Any, horizon: int) -> torch.Tensor:
    """Return initial plans (K, n, A), raw units, within the bounds."""
    if init is not None:
        plans = _prepare(space, init)
        if plans.shape[1] != horizon:
            raise ValueError(f"`init` must have `horizon` = {horizon} actions, got {plans.shape[1]}.")
        return plans
    middle = [
        (least + most) / 2 if math.isfinite(least) and math.isfinite(most) else shift
        for least, most, shift in zip(space.low, space.high, space.offset, strict=True)
    ]
    held = space.hold(torch.tensor(middle))
    return space.clip(held.repeat(1, horizon, 1))


def _prepare(space: ActionSpace, init: Any) -> torch.Tensor:
    """Check given plans (n, A) or (K, n, A); return (K, n, A), clipped to the bounds, on the CPU."""
    if hasattr(init, "__len__") and not len(init):
        raise ValueError("`init` must contain at least one action sequence, got none.")
    try:
        return space.clip(space.prepare(init)).cpu()
    except ValueError as error:
        raise ValueError(f"`init` is invalid: {error}") from error


def _raw(space: ActionSpace, normalized: torch.Tensor) -> torch.Tensor:
    return space.clip(space.denormalise(normalized))


def _bounds(space: ActionSpace, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lower and the upper bounds (A,) in normalized units, also for a negative scale."""
    ends = torch.stack([space.normalise(like.new_tensor(bound)) for bound in (space.low, space.high)])
    return ends.amin(0), ends.amax(0)


def _knots(horizon: int, number: int) -> tuple[torch.Tensor, list[int]]:
    """Return interpolation weights (n, m) and the indices of the m knots."""
    places = np.linspace(0, horizon - 1, number).round().astype(int)
    weights = [np.interp(np.arange(horizon), places, row) for row in np.eye(number)]
    return torch.tensor(np.stack(weights, axis=1), dtype=torch.float32), places.tolist()


def _check_search(planner: CEM | MPPI) -> None:
    for name in ("horizon", "num_candidates", "num_iterations"):
        value = getattr(planner, name)
        require(value >= 1, name, "at least 1", value)
    require(math.isfinite(planner.std) and planner.std > 0, "std", "finite and positive", planner.std)
    knots = planner.num_knots
    require(knots is None or 1 <= knots <= planner.horizon, "num_knots", f"None or in [1, {planner.horizon}]", knots)
