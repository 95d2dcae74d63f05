import json
import re
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from point_world import PointWorld, image

from irasim_diffusers.data import read_video
from irasim_diffusers.envs import WorldModelVectorEnv
from irasim_diffusers.evaluation import PolicyEvaluation, evaluate_policies, run_episodes

GOAL = np.array([0.75, 0.25])
LENGTH = 12
SEEDS = [5, 3, 8, 13, 21, 34, 55]
GAINS = {"good": 0.5, "slow": 0.16, "wrong-way": -0.3}


def picture(position):
    return (255 * image(*position).movedim(0, -1)).round().byte().numpy()


class PointEnv(gymnasium.Env):
    """The real environment of `PointWorld`: an action moves a point, and the goal is fixed."""

    def __init__(self, gain=1.0):
        self.gain = gain
        self.observation_space = gymnasium.spaces.Dict({"pixels": gymnasium.spaces.Box(0, 255, (2, 4, 3), np.uint8)})
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(0.1, 0.9, 2)
        return {"pixels": picture(self.position)}, {}

    def step(self, action):
        self.position = self.position + self.gain * action
        reward = -np.linalg.norm(self.position - GOAL)
        success = bool(reward > -0.05)
        return {"pixels": picture(self.position)}, reward, success, False, {"is_success": success}


def reward(frames):
    return -(frames[:, :, :2, 0, 0] - torch.tensor(GOAL)).norm(dim=-1)


def success(frames):
    return reward(frames) > -0.05


class Proportional:
    """Policy that moves by a fraction of the distance to the goal, at most 0.12 per component."""

    def __init__(self, gain):
        self.gain, self.calls = gain, 0

    def reset(self):
        pass

    def select_action(self, observation):
        self.calls += 1
        position = observation["pixels"][:, 0, 0, :2] / 255
        return torch.as_tensor(np.clip(self.gain * (GOAL - position), -0.12, 0.12), dtype=torch.float32)


def real_environment(rows=3):
    return gymnasium.vector.SyncVectorEnv([PointEnv] * rows)


def world_model(rows=3, gain=1.0, **options):
    return WorldModelVectorEnv(
        PointWorld(gain=gain),
        rows,
        reward=reward,
        success=success,
        autoreset_mode="Disabled",
        max_episode_steps=50,
        **options,
    )


@pytest.fixture
def evaluation(tmp_path):
    policies = {name: Proportional(gain) for name, gain in GAINS.items()}
    return partial(
        PolicyEvaluation,
        policies=policies,
        real=real_environment(),
        output=tmp_path / "out",
        seeds=SEEDS,
        max_episode_steps=LENGTH,
    )


def test_an_exact_world_model_agrees(evaluation, tmp_path):
    report = evaluate_policies(evaluation(model=world_model()))
    rates = {name: entry["real"]["success"]["mean"] for name, entry in report["policies"].items()}
    assert rates["good"] == 1
    assert 0 < rates["slow"] < 1
    assert rates["wrong-way"] == 0
    for entry in report["policies"].values():
        assert entry["same_outcome"]["mean"] == 1
        assert entry["model"]["score"]["mean"] == pytest.approx(entry["real"]["score"]["mean"], abs=0.01)
    assert report["agreement"]["success"]["pearson"]["value"] == pytest.approx(1)
    assert report["agreement"]["success"]["mmrv"]["value"] == 0
    assert report["num_seeds"] == len(SEEDS)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["policies"] == report["policies"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| good | 100% [100%, 100%] | 100% [100%, 100%] |" in text
    assert (tmp_path / "out" / "success.png").stat().st_size > 5000
    entry = report["videos"]["good"][0]
    assert f"({entry['video']}): real success, model success" in text
    episode = json.loads((tmp_path / "out" / "episodes" / "good" / f"{entry['seed']}.json").read_text())
    frames = read_video(tmp_path / "out" / entry["video"])
    assert frames.shape == (max(episode["real"]["length"], episode["model"]["length"]) + 1, 2, 8, 3)


def test_a_wrong_world_model_disagrees(evaluation):
    report = evaluate_policies(evaluation(model=world_model(gain=0.2)))
    good = report["policies"]["good"]
    assert good["real"]["success"]["mean"] == 1
    assert good["model"]["success"]["mean"] < 1
    assert good["success_in_reality_only"] == round(len(SEEDS) * (1 - good["model"]["success"]["mean"]))
    assert good["success_in_model_only"] == 0
    first = report["videos"]["good"][0]
    assert (first["real"], first["model"]) == (True, False)  # disagreements first


def test_the_same_command_resumes(evaluation, tmp_path):
    first = evaluate_policies(evaluation(model=world_model()))
    (tmp_path / "out" / "episodes" / "slow" / "8.json").unlink()
    policies = {name: Proportional(gain) for name, gain in GAINS.items()}
    again = evaluate_policies(evaluation(model=world_model(), policies=policies))
    assert again == first
    assert policies["good"].calls == policies["wrong-way"].calls == 0
    assert 1 < policies["slow"].calls <= 1 + 2 * LENGTH  # one call checks the policy
    with pytest.raises(
        ValueError, match=r"contains an evaluation with other settings: seeds was .*, now .1, 2.: choose a new"
    ):
        evaluate_policies(evaluation(model=world_model(), seeds=[1, 2]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text().replace('"seed": 8', '"seed": 7')),
        lambda path: path.write_text(re.sub(r'"score": [^,]+', '"score": 1' + 400 * "0", path.read_text())),
        lambda path: path.write_text(re.sub(r'"length": \d+', '"length": -1', path.read_text())),
        lambda path: path.with_suffix(".mp4").unlink(),
        lambda path: path.with_suffix(".mp4").write_bytes(b""),
    ],
)
def test_damaged_episodes_are_repeated(evaluation, tmp_path, damage):
    given = evaluation(model=world_model(), policies={"good": Proportional(0.5)})
    first = evaluate_policies(given)
    path = tmp_path / "out" / "episodes" / "good" / "8.json"
    before = path.read_text()
    damage(path)
    assert evaluate_policies(given) == first
    assert path.read_text() == before
    assert path.with_suffix(".mp4").stat().st_size > 0


def test_policies_are_loaded_once(evaluation, tmp_path):
    loaded = []

    def load():
        loaded.append(1)
        return Proportional(0.5)

    report = evaluate_policies(evaluation(model=world_model(), policies={"lazy": load}, num_videos=0))
    assert len(loaded) == 1  # once for the check and all batches
    assert "agreement" not in report
    assert report["policies"]["lazy"]["model"]["success"]["mean"] == 1
    assert not list(tmp_path.rglob("*.mp4"))


def test_random_policies_repeat():
    class Random(Proportional):
        def select_action(self, observation):
            return 0.1 * torch.randn(len(observation["pixels"]), 2).clamp(-1, 1)

    runs = [run_episodes(real_environment(), Random(0), [1, 2, 3], 4) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].score, runs[1].score)
    assert runs[0].length.tolist() == [4, 4, 4]
    assert (runs[0].score != run_episodes(real_environment(), Random(0), [4, 5, 6], 4).score).all()


class Broken(Proportional):
    def select_action(self, observation):
        return torch.full((len(observation["pixels"]), 2), torch.nan)


class FailsLater(Proportional):
    """Policy that returns a given value, or raises RuntimeError, from the third step after its check on."""

    def __init__(self, value):
        super().__init__(0)
        self.value = value

    def select_action(self, observation):
        actions = super().select_action(observation)
        if self.calls <= 3:
            return actions
        if self.value is RuntimeError:
            raise RuntimeError("boom")
        return self.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policies": {"late": FailsLater(RuntimeError)}},
            "policy 'late', seeds 5 to 8: .* fails at step 2: RuntimeError",
        ),
        ({"policies": {"late": FailsLater(None)}}, r"must return actions \(3, 2\), got \(\) at step 2"),
        ({"policies": {"late": FailsLater(np.zeros((3, 1, 2)))}}, r"actions \(3, 2\), got \(3, 1, 2\) at step 2"),
        (
            {"policies": {"late": FailsLater(np.full((3, 2), 1e38))}},
            r"near the bounds of the environment, \[.*\], got 1e\+38 at step 2",
        ),
        ({"policies": {}}, "`policies` must contain at least one policy"),
        ({"policies": {"a/b": Proportional(1)}}, "the name of a policy must consist of letters, .* got 'a/b'"),
        ({"policies": {"..": Proportional(1)}}, "the name of a policy must consist of letters"),
        ({"policies": {"nan": Broken(1)}}, "policy 'nan', seeds 5 to 8: the policy must return finite actions"),
        ({"seeds": []}, "`seeds` must be one or more distinct non-negative integers, got none"),
        ({"seeds": [*range(9), 8]}, r"`seeds` must be one or more distinct non-negative integers, got \[8, 8\]"),
        ({"seeds": [-1]}, "`seeds` must be one or more distinct non-negative integers"),
        ({"max_episode_steps": 0}, "`max_episode_steps` must be at least 1, got 0"),
        ({"max_episode_steps": 51}, "`model` must allow 51 steps per episode, got 50"),
        ({"num_videos": -1}, "`num_videos` must be at least 0, got -1"),
        ({"real": real_environment(2)}, "`real` and `model` must have the same number of rows, got 2 and 3"),
        (
            {"real": gymnasium.make_vec("CartPole-v1", 3)},
            "the observations of `real` must contain `pixels`",
        ),
    ],
)
def test_bad_input_raises(evaluation, tmp_path, changes, message):
    given = evaluation(model=world_model(), **changes)
    with pytest.raises(ValueError, match=message):
        evaluate_policies(given)
    assert not list(tmp_path.rglob("report.*"))
