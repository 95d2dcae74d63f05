import json
import shutil

import numpy as np
import pytest
import torch
from point_world import SPACE, PointWorld, image

from irasim_diffusers.planning import CEM, MPPI, Gradient, Rank
from irasim_diffusers.policies import ChunkPolicy, LeRobotPolicy, PlannerPolicy, check_processor
from irasim_diffusers.pretrained import import_callable
from irasim_diffusers.rewards import GoalImage


def observe(positions):
    """Return an observation of points at positions (B, 2)."""
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
    """Policy with LeRobot's interface that depends on every entry of the batch."""

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
    """Execute a policy in the exact dynamics: an action moves the point."""
    positions = torch.tensor(positions)
    trace = [positions]
    for _ in range(steps):
        trace.append(trace[-1] + policy.select_action(observe(trace[-1].tolist())))
    return torch.stack(trace)


GOAL = GoalImage(image(0.8, 0.1))
PLANNERS = [CEM(4, num_iterations=3), MPPI(4, num_iterations=3, std=0.5), Gradient(4, num_iterations=20)]


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: type(planner).__name__)
def test_closed_loop_reaches_the_goal(planner):
    policy = PlannerPolicy(PointWorld(gain=1.3), planner, GOAL, num_executed=2)  # an inaccurate model
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
    # hold actions follow the end of the plan
    torch.testing.assert_close(given[1][0], torch.cat([plan[3:], torch.zeros(3, 2)]))


def test_proposals_are_ranked():
    """The best of several samples of a policy is executed, as in the paper."""
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
    (lambda given: np.zeros((2, 2)), r"must return actions \(3, 2\) or a chunk \(3, n, 2\), got \(2, 2\)"),
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
    with pytest.raises(ValueError, match=r"`observation` must have `pixels` .* got \['agent_pos'\]"):
        policy.select_action({"agent_pos": observation["agent_pos"]})
    policy.postprocessor = lambda actions: actions[:, None]
    with pytest.raises(ValueError, match=r"must return actions \(3, 2\), got \(3, 1, 2\)"):
        policy.select_action(observation)


class Step:
    """A processor step of LeRobot."""


Step.__module__ = "lerobot.processor.normalize_processor"
STEPS = {"normalizer_processor": Step, "action_tokenizer_processor": Step, "groot_pack": Step, "mine": Follower}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"class": "subprocess.Popen", "config": {"args": ["touch", "x"]}}],
            "got 'subprocess.Popen', which could execute",
        ),
        ([{"class": "lerobot.processor.Anything"}], "got 'lerobot.processor.Anything', which could execute"),
        ([{"registry_name": "normalizer_processor"}, {"registry_name": "mine"}], "got 'mine', which could execute"),
        ([{"registry_name": None, "class": "subprocess.Popen"}], "only registered steps of LeRobot, got None"),
        ([{"registry_name": ["normalizer_processor"]}], "only registered steps of LeRobot"),
        ([{"registry_name": "absent"}], "only registered steps of LeRobot, got 'absent'"),
        ([{"registry_name": "action_tokenizer_processor"}], "executes code from the repository that it names"),
        ([{"registry_name": "groot_pack"}], "executes code from the repository that it names"),
        ([{}], "only registered steps of LeRobot, got None"),
        (["normalizer_processor"], "must contain a list 'steps' of objects"),
        ({"registry_name": "normalizer_processor"}, "must contain a list 'steps' of objects"),
    ],
)
def test_processors_that_could_execute_code_are_rejected(tmp_path, steps, message):
    """The check reads the config before any step is constructed."""
    path = tmp_path / "policy_preprocessor.json"
    path.write_text(json.dumps({"steps": steps}))
    with pytest.raises(ValueError, match=message):
        check_processor(path, STEPS)
    path.write_text(json.dumps({"steps": [{"registry_name": "normalizer_processor"}]}))
    check_processor(path, STEPS)


@pytest.fixture(scope="module")
def act_policy(tmp_path_factory):
    """Folder of a tiny ACT policy that was saved with LeRobot."""
    pytest.importorskip("lerobot", reason="LeRobot 0.6 needs Python 3.12")
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    sizes = {"observation.image": (3, 32, 32), "observation.state": (2,), "action": (2,)}
    kinds = dict(zip(sizes, (FeatureType.VISUAL, FeatureType.STATE, FeatureType.ACTION), strict=True))
    features = {key: PolicyFeature(kinds[key], size) for key, size in sizes.items()}
    config = ACTConfig(
        input_features={key: features[key] for key in list(sizes)[:2]},
        output_features={"action": features["action"]},
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        chunk_size=4,
        n_action_steps=4,
        latent_dim=4,
        pretrained_backbone_weights=None,
        device="cpu",
        push_to_hub=False,
    )
    folder = tmp_path_factory.mktemp("act")
    ACTPolicy(config).save_pretrained(folder)
    shapes = {key: (3, 1, 1) if len(size) == 3 else size for key, size in sizes.items()}
    stats = {key: {"mean": torch.zeros(shape), "std": torch.ones(shape)} for key, shape in shapes.items()}
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder


def test_saved_lerobot_policy_returns_actions(act_policy):
    policy = LeRobotPolicy.from_pretrained(str(act_policy), SPACE, device="cpu")
    policy.postprocessor = None
    policy.policy.model.action_head.weight.data.zero_()
    policy.policy.model.action_head.bias.data = torch.tensor([0.1, -0.1])
    policy.reset()
    given = {"pixels": np.zeros((3, 32, 32, 3), np.uint8), "agent_pos": np.zeros((3, 2), np.float32)}
    torch.testing.assert_close(policy.select_action(given), torch.tensor([[0.1, -0.1]] * 3))


@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_no_code_named_by_a_lerobot_policy_is_executed(act_policy, tmp_path, file):
    folder = shutil.copytree(act_policy, tmp_path / "policy")
    content = json.loads((folder / file).read_text())
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(tmp_path / "executed")]}}
    (folder / file).write_text(json.dumps(content | {"steps": [step, *content["steps"]]}))
    with pytest.raises(ValueError, match=r"could not be loaded: .* got 'subprocess.Popen', which could execute"):
        LeRobotPolicy.from_pretrained(str(folder), SPACE)
    assert not (tmp_path / "executed").exists()


def test_policy_types_that_trust_remote_code_are_rejected(act_policy, tmp_path):
    folder = shutil.copytree(act_policy, tmp_path / "policy")
    (folder / "config.json").write_text(json.dumps({"type": "pi0_fast", "device": "cpu"}))
    with pytest.raises(ValueError, match="policies of type pi0_fast execute code from the repositories"):
        LeRobotPolicy.from_pretrained(str(folder), SPACE)


def test_bad_input(observation):
    world, planner = PointWorld(), CEM(4)
    for name, value in {"num_executed": 0, "num_history_frames": 0, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            PlannerPolicy(world, planner, GOAL, **{name: value})
    with pytest.raises(ValueError, match="`num_executed` must be at least 1"):
        ChunkPolicy(lambda given: given, SPACE, num_executed=0)
    policy = PlannerPolicy(world, planner, GOAL)
    with pytest.raises(
        ValueError, match=r"`observation` must have `pixels` \(B, H, W, 3\) with B at least 1, got \['state'\]"
    ):
        policy.select_action({"state": np.zeros((1, 2))})
    with pytest.raises(ValueError, match=r"`pixels` \(B, H, W, 3\) with B at least 1, got \(2, 4, 3\)"):
        policy.select_action({"pixels": observation["pixels"][0]})
    with pytest.raises(ValueError, match="at least `num_executed` = 8 actions, got 4"):
        policy.select_action(observation)
    with pytest.raises(ValueError, match="must have 3 rows as in the previous steps"):
        policy.select_action(observe([(0.1, 0.2)]))


def test_callables_are_imported_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text("class Rewards:\n    @staticmethod\n    def zero():\n        return 0\n")
    assert import_callable("`reward`", "my_rewards:Rewards.zero")() == 0
    for path in ("my_rewards", "my_rewards:missing", "missing:Rewards", ":", "math:pi"):
        with pytest.raises(ValueError, match=rf"^`reward` must be MODULE:NAME of a callable, got '{path}'[:,] "):
            import_callable("`reward`", path)
