from dataclasses import replace

import pytest
import torch
from point_world import SPACE, PointWorld, image

from irasim_diffusers import roll
from irasim_diffusers.action_space import ActionSpace
from irasim_diffusers.planning import (
    CEM,
    MPPI,
    Disagreement,
    Gradient,
    NoPlanError,
    Rank,
    Scoring,
    straight_lines,
)
from irasim_diffusers.rewards import GoalImage, GoalLatents

HORIZON = 6
GOAL = GoalImage(image(0.75, 0.25))
REACHABLE = torch.tensor([0.5, -0.25])  # from the start to the goal


@pytest.fixture
def world():
    return PointWorld()


@pytest.fixture
def state(world):
    return world.start(image(0.25, 0.5), [7])


@pytest.fixture
def samples():
    """Action sequences (K, n, A) sampled from a policy, some out of bounds."""
    return 0.2 * torch.randn(9, HORIZON, 2, generator=torch.Generator().manual_seed(3))


PLANNERS = {
    "cem": CEM(HORIZON, num_candidates=40, num_iterations=8),
    "cem with knots": CEM(HORIZON, num_candidates=40, num_iterations=8, num_knots=3),
    "mppi": MPPI(HORIZON, num_candidates=60, num_iterations=12, std=0.4, temperature=0.1),
    "gradient": Gradient(HORIZON, num_iterations=60),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_planners_reach_the_goal(name, world, state):
    plan = PLANNERS[name](world, state, GOAL)
    torch.testing.assert_close(plan.actions.sum(0), REACHABLE, atol=0.03, rtol=0)
    torch.testing.assert_close(plan.frames()[-1], GOAL.goal, atol=0.03, rtol=0)
    assert plan.score == plan.scores.max() == GOAL(plan.frames()[None])[0, -1]
    assert plan.frames().shape == (HORIZON, 3, 2, 4)
    assert torch.equal(plan.top(1)[0], plan.actions)


@pytest.mark.parametrize("name", PLANNERS)
def test_candidates_respect_the_bounds(name, world, state, samples):
    """The goal is out of reach, and some samples of the policy are out of bounds."""
    plan = PLANNERS[name](world, state, GoalLatents(world, image(-60.0, 60.0)), init=samples)
    assert torch.equal(plan.candidates, SPACE.clip(plan.candidates))
    assert not torch.equal(samples, SPACE.clip(samples))
    torch.testing.assert_close(plan.actions.mean(0), torch.tensor([-0.125, 0.25]), atol=0.1, rtol=0)
    assert plan.score > Rank()(world, state, GoalLatents(world, image(-60.0, 60.0)), init=samples).score


@pytest.mark.parametrize("name", PLANNERS)
def test_a_plan_is_repeatable_and_does_not_depend_on_the_batch_size(name, samples):
    world = PointWorld(noise=0.05)
    state = world.start(image(0.25, 0.5), [7])
    planner = replace(PLANNERS[name], num_iterations=3)
    expected = planner(world, state, GOAL, init=samples)
    for batch_size in (2, 7, 64):
        world.largest = 0
        plan = replace(planner, scoring=Scoring(batch_size=batch_size))(world, state, GOAL, init=samples)
        assert torch.equal(plan.actions, expected.actions)
        assert torch.equal(plan.scores, expected.scores)
        assert world.largest <= batch_size
    if hasattr(planner, "seed"):
        assert not torch.equal(replace(planner, seed=1)(world, state, GOAL, init=samples).actions, expected.actions)


@pytest.mark.parametrize("name", PLANNERS)
def test_plan_is_at_least_as_good_as_initial_plans(name, samples):
    world = PointWorld(noise=0.3)
    state = world.start(image(0.25, 0.5), [7])
    for goal in (GOAL, GoalImage(image(0.9, 0.9))):
        ranked = Rank()(world, state, goal, init=samples)
        planner = replace(PLANNERS[name], num_iterations=2)
        assert planner(world, state, goal, init=samples).score >= ranked.score


def test_candidates_are_compared_under_the_same_noise(samples):
    world = PointWorld(noise=0.5)
    state = world.start(image(0.25, 0.5), [7])
    twice = samples[:1].repeat(5, 1, 1)
    plan = Rank()(world, state, GOAL, init=twice)
    assert (plan.scores == plan.scores[0]).all()
    assert Rank()(world, world.start(image(0.25, 0.5), [8]), GOAL, init=twice).score != plan.score


def test_rank_of_one_sample_returns_the_policy_plan(world, state):
    sample = torch.tensor([[0.1, -0.2], [0.0, 0.1]])
    for spread in (1.0, 3.0):
        plan = Rank(spread=spread)(world, state, GOAL, init=sample)
        torch.testing.assert_close(plan.actions, sample)


def test_rank_chooses_the_best(world, state, samples):
    plan = Rank()(world, state, GOAL, init=samples)
    ends = SPACE.clip(samples).sum(1)
    errors = (ends - REACHABLE).square().sum(1)
    assert torch.equal(plan.actions, SPACE.clip(samples)[errors.argmin()])
    torch.testing.assert_close(plan.scores, -errors / 3)
    assert torch.equal(plan.top(3), SPACE.clip(samples)[errors.argsort()[:3]])


def test_spread_moves_candidates_from_their_mean(world, state, samples):
    samples = 0.2 * SPACE.clip(samples)
    plan = Rank(spread=2.0)(world, state, GOAL, init=samples)
    torch.testing.assert_close(plan.candidates.mean(0), samples.mean(0))
    torch.testing.assert_close(plan.candidates.std(0), 2 * samples.std(0))


def test_reductions(world, state, samples):
    frames = [
        world.decode(torch.cat([latents for _, latents in roll(world, state, plan[None])], dim=2)) for plan in samples
    ]
    scores = GOAL(torch.cat(frames))
    for reduction, expected in (("last", scores[:, -1]), ("mean", scores.mean(1)), ("max", scores.amax(1))):
        found = Scoring(reduction=reduction, chunk_length=2)(world, state, samples, GOAL)
        torch.testing.assert_close(found, expected)


def test_only_frames_that_the_objective_needs_are_decoded(world, state, samples):
    Rank()(world, state, GOAL, init=samples)
    assert world.decoded == 1 + len(samples)  # the current frame, and the last frame of each candidate
    world.decoded = 0
    plan = Rank()(world, state, GoalLatents(world, GOAL.goal), init=samples)
    assert world.decoded == 0
    torch.testing.assert_close(plan.scores * 2 / 3, Rank()(world, state, GOAL, init=samples).scores)


def test_gradient_improves_every_plan(world, state, samples):
    before = Rank()(world, state, GOAL, init=samples).scores
    after = Gradient(HORIZON, num_iterations=5)(world, state, GOAL, init=samples).scores
    assert (after >= before).all()
    assert (after > before + 1e-4).sum() >= len(samples) - 1
    unchanged = Gradient(HORIZON, num_iterations=0)(world, state, GOAL, init=samples).scores
    torch.testing.assert_close(unchanged, before)


def test_gradient_reaches_a_network(pipeline, frames):
    state = pipeline.start(frames, [4])
    scoring = Scoring(batch_size=2, sampling={"num_inference_steps": 1})
    init = torch.zeros(3, 4, 3) + torch.arange(3)[:, None, None]
    goal = GoalLatents(pipeline, torch.rand(3, 8, 12))
    ranked = Rank(scoring=scoring)(pipeline, state, goal, init=init)
    plan = Gradient(4, num_iterations=3, scoring=scoring)(pipeline, state, goal, init=init)
    assert (plan.scores >= ranked.scores).all()
    assert plan.score > ranked.score
    assert all(parameter.grad is None for parameter in pipeline.transformer.parameters())
    assert plan.frames().shape == (4, 3, 8, 12)


def nan_above(limit):
    """Objective that returns the goal's score, but NaN or infinity for good candidates."""

    def objective(frames):
        scores = GOAL(frames)
        bad = torch.where(frames[:, :, 1, 0, 0] > 0.4, torch.nan, torch.inf)
        return torch.where(scores > limit, bad, scores)

    return objective


@pytest.mark.parametrize("name", PLANNERS)
def test_non_finite_candidates_are_never_chosen(name, world, state, samples):
    limit = -0.01
    plan = PLANNERS[name](world, state, nan_above(limit), init=samples)
    assert -0.2 < plan.score <= limit
    # `gradient` keeps the best finite step of each candidate
    assert name == "gradient" or not plan.scores.isfinite().all()
    assert torch.isfinite(nan_above(limit)(world.decode(plan.latents()))[0, -1])
    assert len(plan.top(1000)) == plan.scores.isfinite().sum()


@pytest.mark.parametrize("name", [*PLANNERS, "rank"])
def test_no_finite_score_raises(name, world, state, samples):
    def objective(frames):  # its score is finite for the current frame only
        moved = (frames[:, :, 0, 0, 0] - 0.25).abs() + (frames[:, :, 1, 0, 0] - 0.5).abs() > 1e-6
        return frames.mean(dim=(2, 3, 4)).masked_fill(moved, torch.nan)

    planner = {"rank": Rank()} | PLANNERS
    with pytest.raises(NoPlanError, match=r"none of the \d+ candidates has a finite score"):
        planner[name](world, state, objective, init=samples)


def test_guard_prefers_plans_on_which_the_models_agree(world, state):
    """The other model moves the point three times as far, so that they disagree more on the longer plan."""
    other = PointWorld(gain=3.0)
    near, far = torch.zeros(2, 3, 2)
    near[:, 0], far[:, 0], far[:, 1] = 0.1, 0.17, -0.08
    init = torch.stack([near, far])
    assert torch.equal(Rank()(world, state, GOAL, init=init).actions, far)
    guarded = Rank(scoring=Scoring(guard=Disagreement(models=[other])))(world, state, GOAL, init=init)
    own, others = (Scoring()(model, state, init, GOAL) for model in (world, other))
    torch.testing.assert_close(guarded.scores, torch.minimum(own, others))
    assert torch.equal(guarded.actions, near)
    spread = (own - others).abs() / 2
    limited = Disagreement(models=[other], weight=0.0, limit=float(spread.mean()))
    plan = Rank(scoring=Scoring(guard=limited))(world, state, GOAL, init=init)
    assert plan.scores.isfinite().tolist() == [True, False]
    assert torch.equal(plan.actions, near)
    with pytest.raises(NoPlanError, match="guard"):
        Rank(scoring=Scoring(guard=replace(limited, limit=0.0)))(world, state, GOAL, init=init)


def test_guard_over_seeds(samples):
    world = PointWorld(noise=0.2)
    state = world.start(image(0.25, 0.5), [7])
    plan = Rank(scoring=Scoring(guard=Disagreement(num_seeds=4, weight=0.5)))(world, state, GOAL, init=samples)
    seeds = (7, 7 + 1_000_003, 7 + 2_000_006, 7 + 3_000_009)
    scores = torch.stack(
        [Scoring()(world, replace(state, seeds=(seed,)), SPACE.clip(samples), GOAL) for seed in seeds]
    )
    assert scores.std(0).min() > 0
    torch.testing.assert_close(plan.scores, scores.mean(0) - 0.5 * scores.std(0, correction=0))


def test_guard_is_optimized_by_the_gradient(world, state):
    guard = Disagreement(models=[PointWorld(gain=0.5)])
    plan = Gradient(HORIZON, num_iterations=80, scoring=Scoring(guard=guard))(world, state, GOAL)
    middle = REACHABLE / 0.75  # there, the final points of both models are equally far from the goal
    torch.testing.assert_close(plan.actions.sum(0), middle, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("components", [(0, 1), (0, 1, 2)])
def test_straight_lines(kind, components):
    size = 4
    space = ActionSpace(
        ("a",) * size, (None,) * size, (-9.0,) * size, (9.0,) * size, (1.0,) * size, (0.0,) * size, kind
    )
    start = torch.tensor([1.0, 2.0, 3.0, 4.0])
    paths = straight_lines(space, 5, 2.0, num_candidates=30, start=start, components=components)
    assert paths.shape == (30, 5, 4)
    places = paths if kind == "absolute" else start + paths.cumsum(1)
    moves = torch.diff(places, dim=1, prepend=start.expand(30, 1, 4))
    torch.testing.assert_close(moves, moves[:, :1].expand(-1, 5, -1))
    torch.testing.assert_close(moves.norm(dim=-1), torch.full((30, 5), 0.4))
    still = [index for index in range(size) if index not in components]
    assert (moves[..., still] == 0).all()
    assert (places[:, -1].mean(0) - start).abs().max() < 0.7  # lines in all directions
    assert not torch.equal(paths, straight_lines(space, 5, 2.0, 30, start, components, seed=1))


def test_straight_lines_and_a_goal_image(world, state):
    """The paper's planner: 50 lines, of which the one toward the goal is the best."""
    lines = straight_lines(SPACE, HORIZON, radius=0.5)
    plan = Rank()(world, state, GOAL, init=lines)
    direction = plan.actions.sum(0)
    assert torch.cosine_similarity(direction, REACHABLE, dim=0) > 0.98
    assert plan.top(5).shape == (5, HORIZON, 2)


def test_plan_for_absolute_targets():
    space = replace(SPACE, kind="absolute", low=(0.0, 0.0), high=(1.0, 1.0), offset=(0.5, 0.5))
    world = PointWorld(action_space=space)
    state = world.start(image(0.25, 0.5), [7])
    start = torch.tensor([0.25, 0.5])
    lines = straight_lines(space, HORIZON, 0.5, start=start)
    assert torch.equal(lines, space.clip(lines))
    plan = CEM(HORIZON, num_iterations=8)(world, state, GOAL, init=lines)
    torch.testing.assert_close(plan.actions[-1], torch.tensor([0.75, 0.25]), atol=0.03, rtol=0)


CONSTANT = torch.zeros(1, HORIZON, 2)
BAD = [
    (lambda *_: CEM(0), "`horizon` must be at least 1, got 0"),
    (lambda *_: MPPI(0), "`horizon` must be at least 1, got 0"),
    (lambda *_: Gradient(0), "`horizon` must be at least 1, got 0"),
    (lambda *_: CEM(5, num_candidates=0), "`num_candidates` must be at least 1, got 0"),
    (lambda *_: CEM(5, num_elites=65), r"`num_elites` must be in \[1, 64\], got 65"),
    (lambda *_: CEM(5, std=float("nan")), "`std` must be finite and positive, got nan"),
    (lambda *_: CEM(5, min_std=2.0), r"`min_std` must be in \[0, 1\], got 2"),
    (lambda *_: CEM(5, num_knots=6), r"`num_knots` must be None or in \[1, 5\], got 6"),
    (lambda *_: MPPI(5, temperature=0.0), "`temperature` must be positive and finite, got 0"),
    (lambda *_: Gradient(5, learning_rate=0.0), "`learning_rate` must be positive"),
    (lambda *_: Gradient(5, num_iterations=-1), "`num_iterations` must be at least 0"),
    (lambda *_: Rank(spread=-1.0), "`spread` must be finite and at least 0"),
    (lambda *_: Scoring(batch_size=0), "`batch_size` must be at least 1"),
    (lambda *_: Scoring(reduction="sum"), "`reduction` must be one of last, mean, max, got 'sum'"),
    (lambda *_: Disagreement(), "the guard requires at least two members"),
    (lambda *_: Disagreement(num_seeds=2, weight=-1.0), "`weight` must be finite and at least 0"),
    (lambda *_: Disagreement(num_seeds=2, limit=-1.0), "`limit` must be None or at least 0"),
    (lambda world, state: Rank()(world, state, GOAL), "`init` must be the candidates"),
    (lambda world, state: Rank()(world, state, GOAL, init=[]), "`init` must contain at least one action sequence"),
    (lambda world, state: Rank()(world, state, GOAL, init=CONSTANT[:0]), "`init` must contain at least one"),
    (lambda world, state: Rank()(world, state, GOAL, init=CONSTANT[:, :0]), "`init` is invalid"),
    (lambda world, state: Rank()(world, state, GOAL, init=CONSTANT[..., :1]), "`init` is invalid: .*2"),
    (lambda world, state: Rank()(world, state, GOAL, init=CONSTANT / 0), "`init` is invalid"),
    (lambda world, state: Rank()(world, state, GOAL, init=CONSTANT + 1e9), "`init` is invalid: .*near the bounds"),
    (lambda world, state: CEM(5)(world, state, GOAL, init=CONSTANT), "`init` must have `horizon` = 5 actions, got 6"),
    (lambda world, state: CEM(5)(world, state.repeat(2), GOAL), "`state` must have one row, got 2"),
    (lambda world, state: CEM(5)(world, state, GoalImage(torch.zeros(3, 4, 2))), "must be for frames of 2x4"),
    (
        lambda world, state: CEM(5)(world, state, lambda frames: GOAL(frames) / 0),
        "`objective` must return finite scores, got -inf",
    ),
    (
        lambda world, state: CEM(5)(world, state, lambda frames: GOAL(frames) * torch.nan),
        "`objective` must return finite",
    ),
    (lambda world, state: CEM(5)(world, state, lambda frames: GOAL(frames)[0]), r"`objective` must return one score"),
    (lambda world, state: CEM(5)(world, state, lambda frames: 1.0), "`objective` must return one score .* float"),
    (
        lambda world, state: Gradient(5)(world, state, lambda frames: GOAL(frames).detach()),
        "and `objective` must be differentiable",
    ),
    (lambda *_: straight_lines(SPACE, 0, 1.0), "`horizon` must be at least 1"),
    (lambda *_: straight_lines(SPACE, 5, 0.0), "`radius` must be positive"),
    (lambda *_: straight_lines(SPACE, 5, 1.0, num_candidates=0), "`num_candidates` must be at least 1"),
    (
        lambda *_: straight_lines(SPACE, 5, 1.0, components=(0, 2)),
        r"`components` must be one or more different indices in \[0, 1\]",
    ),
    (lambda *_: straight_lines(replace(SPACE, kind="absolute"), 5, 1.0), "`start` must be the current position"),
    (lambda *_: straight_lines(SPACE, 5, 1.0, start=[1.0]), "`start` is invalid: .*2"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_raises_before_any_prediction(call, message, world, state):
    with pytest.raises(ValueError, match=message):
        call(world, state)
    assert world.largest == 0 or "differentiable" in message
