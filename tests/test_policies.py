import numpy as np
import pytest
import torch
from point_world import SPACE, PointWorld, image

from irasim_diffusers.planning import CEM, MPPI, Gradient, Rank
from irasim_diffusers.policies import ChunkPolicy, LeRobotPolicy, PlannerPolicy
from irasim_diffusers.rewards import GoalImage


def observe(positions):
    """Observation of points at positions (B, 2)."""
    pixels = np.stack([(255 * image(x, y).clamp(0, 1)).round().byte().permute(1, 2, 0).numpy() for x, y in positions])
    return {"pixels": pixels, "agent_pos": np.asarray(positions, dtype=np.float32)}


@pytest.fixture
def observation():
    return observe([(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)])


def test_callable_returns_actions_or_chunks(observation):
    calls = []

    def chunks(given):
        calls.append(given)
        return 0.01 * torch.arange(3 * 4 * 2).reshape(3, 4, 2)

    policy = ChunkPolicy(chunks, SPACE)
    found = torch.stack([policy.select_action(observation) for _ in range(5)], dim=1)
    assert torch.equal(found[:, :4], chunks(None))
    assert torch.equal(found[:, 4], found[:, 0])
    assert len(calls) == 3
    policy.reset()
    assert torch.equal(policy.select_action(observation), found[:, 0])

    policy = ChunkPolicy(chunks, SPACE, num_executed=2)
    found = torch.stack([policy.select_action(observation) for _ in range(4)], dim=1)
    assert torch.equal(found, chunks(None)[:, [0, 1, 0, 1]])

    single = ChunkPolicy(lambda given: given["agent_pos"] / 4, SPACE)
    torch.testing.assert_close(single.select_action(observation), torch.from_numpy(observation["agent_pos"]) / 4)


class Follower:
    """A policy with LeRobot's interface that depends on every entry of the batch."""

    resets = 0

    def reset(self):
        self.resets += 1

    def select_action(self, batch):
        assert batch["task"] == ["go"] * 3
        assert batch["observation.images.top"].shape == (3, 3, 2, 4)
        return batch["observation.state"] - batch["observation.images.top"][:, :2, 0, 0]


def test_lerobot_policy(observation):
    policy = LeRobotPolicy(
        Follower(),
        SPACE,
        preprocessor=lambda batch: batch | {"observation.state": 2 * batch["observation.state"]},
        postprocessor=lambda actions: actions / 10,
        camera="observation.images.top",
        task="go",
    )
    policy.reset()
    assert policy.policy.resets == 1
    expected = torch.from_numpy(observation["agent_pos"]) / 10
    torch.testing.assert_close(policy.select_action(observation), expected, atol=1e-3, rtol=0)


def run(policy, positions, steps):
    """Execute a policy in the exact world."""
    positions = torch.tensor(positions)
    trace = [positions]
    for _ in range(steps):
        trace.append(trace[-1] + policy.select_action(observe(trace[-1].tolist())))
    return torch.stack(trace)


GOAL = GoalImage(image(0.8, 0.1))
PLANNERS = [CEM(4, num_iterations=3), MPPI(4, num_iterations=3, std=0.5), Gradient(4, num_iterations=20)]


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: type(planner).__name__)
def test_closed_loop_reaches_the_goal(planner):
    policy = PlannerPolicy(PointWorld(gain=1.3), planner, GOAL, num_executed=2)  # a model that is wrong
    trace = run(policy, [(0.2, 0.7), (0.9, 0.3)], 14)
    torch.testing.assert_close(trace[-1], torch.tensor([[0.8, 0.1]] * 2), atol=0.06, rtol=0)
    assert len(policy.plans) == 2


def test_rows_do_not_depend_on_each_other():
    starts = [(0.2, 0.7), (0.9, 0.3)]
    policies = [PlannerPolicy(PointWorld(noise=0.1), CEM(4, num_iterations=2), GOAL, 2) for _ in range(3)]
    together = run(policies[0], starts, 6)
    for row in range(2):
        torch.testing.assert_close(together[:, row], run(policies[1 + row], starts[row : row + 1], 6)[:, 0])
    policies[0].reset()
    assert torch.equal(run(policies[0], starts, 6), together)


def test_planning_starts_from_the_remaining_plan():
    given = []

    def planner(model, state, objective, init):
        given.append((init, state.seeds))
        return Rank()(model, state, objective, init=plan)

    plan = torch.linspace(0, 0.1, 10).reshape(5, 2)
    policy = PlannerPolicy(PointWorld(), planner, GOAL, num_executed=3, seed=4)
    run(policy, [(0.2, 0.7)], 4)
    assert given[0] == (None, (4,))
    assert given[1][1] == (5,)
    torch.testing.assert_close(given[1][0], torch.cat([plan[3:], torch.zeros(3, 2)]))  # no motion after its end


def test_proposals_are_ranked():
    """The paper's planner in closed loop: samples of a policy, of which the best is executed."""
    policy = PlannerPolicy(
        PointWorld(),
        Rank(),
        GOAL,
        num_executed=3,
        propose=lambda given: torch.stack([torch.tensor([[x, -0.1]] * 3) for x in (-0.1, 0.0, 0.1)]),
    )
    trace = run(policy, [(0.2, 0.7), (0.9, 0.7)], 3)
    torch.testing.assert_close(trace[-1], torch.tensor([[0.5, 0.4], [0.9, 0.4]]))


def test_history_frames_are_those_observed(pipeline):
    seen = []

    def planner(model, state, objective, init):
        seen.append(state.latents)
        return Rank()(model, state, objective, init=np.zeros((2, 3)))

    policy = PlannerPolicy(pipeline, planner, lambda frames: frames.mean((2, 3, 4)), 1, num_history_frames=2)
    frames = np.random.default_rng(1).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    for frame in frames:
        policy.select_action({"pixels": frame[None]})
    assert [latents.shape[2] for latents in seen] == [1, 2, 2]
    torch.testing.assert_close(seen[2], pipeline.start(frames[1:], [0]).latents)


WRONG = [
    (lambda given: np.full((3, 2), np.nan), "invalid actions: .*finite"),
    (lambda given: np.full((3, 2), 1e9), "invalid actions: .*bounds"),
    (lambda given: np.zeros((2, 2)), r"must return actions \(3, 2\) or a chunk \(3, n, 2\), got \(2, 1, 2\)"),
    (lambda given: np.zeros((3, 5)), r"must return actions \(3, 2\)"),
    (lambda given: np.zeros(2), r"must return actions \(3, 2\).*got \(2,\)"),
    (lambda given: np.zeros((3, 0, 2)), "invalid actions"),
    (lambda given: np.zeros((3, 1, 2)), "at least `num_executed` = 2 actions per chunk, got 1"),
]


@pytest.mark.parametrize(("function", "message"), WRONG)
def test_wrong_actions_raise(function, message, observation):
    with pytest.raises(ValueError, match=message):
        ChunkPolicy(function, SPACE, num_executed=2).select_action(observation)


def test_wrong_actions_of_a_lerobot_policy_raise(observation):
    policy = LeRobotPolicy(Follower(), SPACE, postprocessor=lambda actions: actions * torch.nan, task="go")
    policy.camera = "observation.images.top"
    with pytest.raises(ValueError, match="invalid actions"):
        policy.select_action(observation)


def test_bad_input(observation):
    world, planner = PointWorld(), CEM(4)
    for name, value in {"num_executed": 0, "num_history_frames": 0, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            PlannerPolicy(world, planner, GOAL, **{name: value})
    with pytest.raises(ValueError, match="`num_executed` must be at least 1"):
        ChunkPolicy(lambda given: given, SPACE, num_executed=0)
    policy = PlannerPolicy(world, planner, GOAL)
    with pytest.raises(ValueError, match=r"`observation` must have `pixels` \(B, H, W, 3\), got \['state'\]"):
        policy.select_action({"state": np.zeros((1, 2))})
    with pytest.raises(ValueError, match=r"`pixels` \(B, H, W, 3\), got \(2, 4, 3\)"):
        policy.select_action({"pixels": observation["pixels"][0]})
    with pytest.raises(ValueError, match="at least `num_executed` = 8 actions, got 4"):
        policy.select_action(observation)
    with pytest.raises(ValueError, match="must have 3 rows as before"):
        policy.select_action(observe([(0.1, 0.2)]))
