"""Scripts of the closed loop: proprioception, reward, policy improvement, guards and benchmark."""

import json

import closed_loop
import collect
import evaluate
import guard
import improve_policy
import numpy as np
import pytest
import study
import torch
import train_policy
import train_proprioception
import train_reward
from diffusion_policy import DiffusionPolicy
from simulator import Simulator
from test_lerobot import write_folder
from tiny_models import tiny_pipeline
from train_reward import ious

from irasim_diffusers import IRASimPipeline, ProprioceptionModel, embedded_checkpoint
from irasim_diffusers.data import Episode
from irasim_diffusers.envs import WorldModelVectorEnv, load_world_model


class Dots:
    """Data source of black 8x12 frames with a white dot; the state is the position of the dot."""

    name = "dots"

    def __len__(self):
        return 40

    def states(self, number):
        return np.random.default_rng(number).uniform(1, 6, (8, 2)).astype(np.float32)

    def vectors(self, number):
        return {"action": np.zeros((8, 3), np.float32), "observation.state": self.states(number)}

    def window(self, number, start, length):
        rows = slice(start, start + length)
        states = self.states(number)[rows]
        y, x = np.mgrid[:8, :12]
        distance = (x - states[:, :1, None]) ** 2 + (y - states[:, 1:, None]) ** 2
        frames = np.repeat((255 * np.exp(-distance / 2)).astype(np.uint8)[..., None], 3, -1)
        return Episode(frames, np.zeros((length, 3), np.float32), {"observation.state": states})

    def component_names(self, key):
        return ["x", "y"]


@pytest.fixture
def stored(tmp_path):
    pipeline = tiny_pipeline(num_inference_steps=1)
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_proprioception_is_trained_measured_and_found(stored, monkeypatch):
    monkeypatch.setattr(train_proprioception, "open_dataset", lambda path: Dots())
    flags = ["--dataset", "a", "--validation_dataset", "b", "--model", stored, "--state_high", 12, 12]
    flags += ["--num_windows", 30, "--num_rollouts", 2, "--num_validation_windows", 5, "--num_predicted", 3]
    flags += ["--max_train_steps", 120, "--learning_rate", 0.01]
    monkeypatch.setattr("sys.argv", ["train_proprioception.py", *map(str, flags)])
    train_proprioception.main()
    report = json.loads((stored / "proprioception" / "metrics.json").read_text())
    assert report["recorded"]["frames"] == report["predicted"]["frames"] == 15
    assert report["recorded"]["median"] < 1.2  # predicting the mean position gives about 2
    # a pixel corresponds to one unit
    assert report["recorded"]["median_px"] == pytest.approx(report["recorded"]["median"], abs=1e-3)
    weights = stored / "proprioception" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    monkeypatch.setattr("sys.argv", ["train_proprioception.py", *map(str, flags), "--max_train_steps", "0"])
    train_proprioception.main()  # without training steps, the script only evaluates
    assert json.loads((stored / "proprioception" / "metrics.json").read_text()) == report
    assert weights.read_bytes() == before
    environment = WorldModelVectorEnv.from_pretrained(stored, 1, "cpu")
    assert environment.single_observation_space["agent_pos"].high.tolist() == [12, 12]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--model", ""], ValueError, r"`output_dir` is required unless .*: pass --output_dir .*, or --model"),
        (["--model", "org/name"], ValueError, r"`output_dir` is required unless .*, got `model` 'org/name': pass"),
        (["--state_key", "pose"], ValueError, "`state_key` must be among the states .* of .*, got 'pose'"),
        (["--batch_size", 1], ValueError, "`batch_size` must be at least 2"),
        (["--num_rollouts", 300], ValueError, r"`num_rollouts` must be at most `num_windows` \(250\), got 300"),
        (["--learning_rate", "nan"], ValueError, "`learning_rate` must be finite, got nan"),
        (
            ["--num_predicted", 1000],
            ValueError,
            "must have at least 1002 frames, got .*: use a smaller `num_predicted`",
        ),
        (["--learning_rate", 1e30], FloatingPointError, r"the loss is (nan|inf) at step \d+: use a lower"),
    ],
)
def test_failed_proprioception_training_writes_nothing(stored, monkeypatch, flags, error, message):
    monkeypatch.setattr(train_proprioception, "open_dataset", lambda path: Dots())
    sizes = [] if "at most `num_windows`" in message else ["--num_windows", 4, "--num_rollouts", 1]
    command = ["train_proprioception.py", "--dataset", "a", "--validation_dataset", "b", "--model", stored, *sizes]
    command += ["--num_validation_windows", 2, "--num_predicted", 3, "--max_train_steps", 30, "--state_high", 12, 12]
    monkeypatch.setattr("sys.argv", [str(part) for part in (*command, *flags)])
    with pytest.raises(error, match=message):
        train_proprioception.main()
    assert not (stored / "proprioception").exists()


def test_histories_require_two_frames(monkeypatch):
    monkeypatch.setattr(Dots, "vectors", lambda self, number: {"action": np.zeros((1, 3), np.float32)})
    with pytest.raises(ValueError, match="episodes of 'dots' must have at least 2 frames, got 1 in episode"):
        improve_policy.draw_states(Dots(), np.random.default_rng(0), 1)


@pytest.mark.parametrize("length", [100, 7])
def test_windows_longer_than_the_episodes_raise(stored, length):
    arguments = train_proprioception.ProprioceptionArguments("a", "b", num_predicted=length)
    pipeline = IRASimPipeline.from_pretrained(stored)
    with pytest.raises(ValueError, match=f"of 'dots' must have at least {2 + length} frames, got 8 in episode"):
        train_proprioception.draw_windows(Dots(), pipeline, arguments, 1, 1, seed=0)


def test_errors_are_distances():
    model = ProprioceptionModel(["x", "y"], [0.0] * 2, [9.0] * 2, [0.0] * 2, [1.0] * 2)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    frames = torch.zeros(4, 3, 8, 12, dtype=torch.uint8)
    states = torch.tensor([[3.0, 4.0]]).repeat(4, 1)
    report = train_proprioception.errors(model, frames, states, 0.5)
    assert (report["median"], report["p95"], report["mean_px"]) == (5.0, 5.0, 2.5)


def test_stored_reward_reads_the_iou_and_the_success():
    """The reward of `irasim/PushT-v0` on simulator frames is close to the IoU, near and far from the goal."""
    stored = load_world_model(embedded_checkpoint(), "cpu")
    simulator, rng = Simulator(), np.random.default_rng(0)
    frames, true = [], []
    for spread in (0.0, 0.0, 0.3, 0.3, 1.0, 1.0, 4.0):
        x, y, angle = np.array([256, 256, np.pi / 4]) + spread * rng.normal(size=3) * [15, 15, 0.2]
        simulator.reset(0)
        simulator.environment.block.angle = angle
        simulator.environment.block.position = (x, y)
        state = simulator.step([100, 400])
        frames.append(simulator.frame())
        true.append(ious(state.block[None])[0])
    frames = torch.from_numpy(np.stack(frames)).movedim(-1, 1)[:, None] / 255
    assert np.abs(stored["reward"](frames)[:, 0].detach().numpy() - true).max() < 0.06
    assert stored["success"](frames)[:, 0].tolist() == [iou > 0.9 for iou in true]
    assert true[0] > 0.95
    assert true[-1] < 0.5


FOLDERS = {
    train_reward: ["--dataset", "set"],
    train_policy: ["--datasets", "set"],
    train_proprioception: ["--dataset", "set", "--validation_dataset", "set"],
    improve_policy: ["--policy", "policy", "--dataset", "set"],
    study: ["--datasets", "set", "--test_dataset", "set"],
}
FILES = {
    guard: ["--dataset", "set"],
    evaluate: ["--model", str(embedded_checkpoint()), "--dataset", "set"],
    closed_loop: [],
}


@pytest.mark.parametrize("script", [*FOLDERS, *FILES], ids=lambda script: script.__name__)
def test_unusable_outputs_raise_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    flag, message = ("--output_dir", "`output_dir`") if script in FOLDERS else ("--output", "--output")
    for name in ("file", "loop", "file/new") if script in FOLDERS else ("folder.json", "loop/new.json"):
        command = [script.__name__, *(FOLDERS | FILES)[script], flag, name]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(ValueError, match=f"^{message} must be (a folder|a file|writable)"):
            script.main()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "script", [train_reward, train_policy, guard, evaluate, study], ids=lambda script: script.__name__
)
def test_missing_states_raise_before_any_work(script, tmp_path, monkeypatch):
    write_folder(tmp_path / "set")  # without the pose of a block
    monkeypatch.chdir(tmp_path)
    output = ["--output_dir", "out"] if script in FOLDERS else ["--output", "out.json"]
    monkeypatch.setattr("sys.argv", [script.__name__, *(FOLDERS | FILES)[script], *output])
    message = (
        "'set' must have the state 'observation.environment_state', got .*'observation.state'.*: collect a dataset"
    )
    with pytest.raises(ValueError, match=message):
        script.main()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_benchmark_of_environments(tmp_path, monkeypatch):
    flags = ["--num_envs", 1, 2, "--num_steps", 1, "--memory_steps", 5, "--num_candidates", 2, "--horizon", 1]
    flags += ["--dtype", "bfloat16", "--output", tmp_path / "report.json"]
    monkeypatch.setattr("sys.argv", ["closed_loop.py", *map(str, flags)])
    closed_loop.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["rows"] for row in report["speed"]] == [1, 2]
    assert all(row["per_cpu_second"] > 0 for row in report["speed"])
    assert [reading["step"] for reading in report["memory"]] == [1, 2, 3, 4, 5]
    assert report["decision"].pop("seconds") > 0
    assert report["decision"] == {"candidates": 2, "horizon": 1, "dtype": "bfloat16"}


def improve(monkeypatch, output, *flags):
    monkeypatch.setattr(improve_policy, "open_dataset", lambda path: Arena())
    small = ["--num_iterations", 2, "--num_states", 2, "--group_size", 3, "--num_updates", 2, "--num_executed", 2]
    small += ["--num_episodes", 1, "--max_episode_steps", 4, "--min_spread", 0, "--dataset", "recorded"]
    command = ["improve_policy.py", "--policy", output.parent / "policy", *small, "--output_dir", output, *flags]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    improve_policy.main()
    return json.loads((output / "report.json").read_text())


class Arena(Dots):
    """Recorded episodes of noise with the frame size of Push-T."""

    def window(self, number, start, length):
        frames = np.random.default_rng(number).integers(0, 256, (length, 96, 96, 3), dtype=np.uint8)
        return Episode(frames, np.zeros((length, 2), np.float32), {"observation.state": np.full((length, 2), 200.0)})


def test_a_policy_is_improved_in_the_model_and_resumes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    DiffusionPolicy(horizon=4, channels=(8, 8), width=16, num_blocks=1, condition_dim=16).save_pretrained(
        tmp_path / "policy"
    )
    report = improve(monkeypatch, tmp_path / "whole")
    assert len(report["rewards"]) == 2
    assert report["before"]["max_iou"]["n"] == report["after"]["max_iou"]["n"] == 1
    improve(monkeypatch, tmp_path / "parts", "--num_iterations", 1)
    assert improve(monkeypatch, tmp_path / "parts")["rewards"] == report["rewards"]
    whole, parts = (DiffusionPolicy.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), parts.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"contains a run with other settings: seed was '0'\."):
        improve(monkeypatch, tmp_path / "parts", "--seed", 1)
    with pytest.raises(ValueError, match=r"contains a run with other settings: reward was not set\."):
        improve(monkeypatch, tmp_path / "parts", "--reward", tmp_path / "reward")
    with pytest.raises(
        ValueError, match=r"`num_iterations` must be at least 2, the iterations of the run in .*, got 1"
    ):
        improve(monkeypatch, tmp_path / "parts", "--num_iterations", 1)
    with pytest.raises(ValueError, match="`group_size` must be at least 2, got 1"):
        improve(monkeypatch, tmp_path / "new", "--group_size", 1)


def test_good_chunks_become_more_likely(tmp_path):
    """The reward of a chunk is its motion to the right, so the policy learns to move right."""
    torch.manual_seed(1)  # with this seed, the samples of the initial policy have a wide spread
    DiffusionPolicy(horizon=4, channels=(8, 8), width=16, num_blocks=1, condition_dim=16).save_pretrained(tmp_path)
    arguments = improve_policy.ImproveArguments(str(tmp_path), "", tmp_path, learning_rate=3e-3, num_updates=40)
    run, generator = improve_policy.Improvement(arguments), torch.Generator().manual_seed(0)
    observation = {"pixels": np.zeros((2, 96, 96, 3), np.uint8), "agent_pos": np.full((2, 2), 250, np.float32)}
    ends = []
    for _ in range(3):
        chunks = run.policy.sample(observation, 16, generator)
        ends.append(chunks[..., -1, 0].mean().item())
        scores = chunks[..., -1, 0]
        weights = ((scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)).clamp(0, 3)
        run.update(observation, chunks, weights, generator)
    assert ends[0] + 20 < ends[1] < ends[2]


def test_a_guard_is_measured_against_the_simulator(tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--episodes", 2, "--length", 25, "--first_seed", 3, "--num_workers", 1, "--aimless", 1]
        flags += ["--expert", 0, "--noisy", 0, "--keys", 0, "--jumps", 0, "--output", tmp_path / "set"]
        patch.setattr("sys.argv", list(map(str, ["collect.py", *flags])))
        collect.main()
    monkeypatch.setattr(guard, "COVERED", (-1.0, 1.0))
    flags = ["--dataset", tmp_path / "set", "--others", embedded_checkpoint(), "--first_seed", 3, "--num_states", 2]
    flags += ["--horizon", 2, "--num_candidates", 2, "--num_iterations", 1, "--output", tmp_path / "guard.json"]
    monkeypatch.setattr("sys.argv", list(map(str, ["guard.py", *flags])))
    guard.main()
    content = json.loads((tmp_path / "guard.json").read_text())
    rows = [row for rows in content["plans"].values() for row in rows]
    assert [row["plan"] for row in rows] == ["recorded", "cem"] * 2
    assert all(row["spread"]["pusht"] == pytest.approx(0, abs=1e-4) for row in rows)  # compared with itself
    recorded = collect.LeRobotFolder(tmp_path / "set")
    for number, row in enumerate(rows[::2]):
        places = np.isclose(ious(recorded[number].states["observation.environment_state"]), row["true"], atol=1e-5)
        assert places.any()  # the simulator repeats the recorded episode


def test_recall_and_false_alarms_of_a_guard():
    plans = [
        {"plan": "recorded", "before": 0, "predicted": 0.1, "true": 0.1, "spread": {"a": 0.01 * i}} for i in range(21)
    ]
    for predicted, spread in ((0.9, 0.3), (0.9, 0.1), (0.1, 0.2), (0.1, 0.0), (0.1, 0.0)):
        plans.append({"plan": "cem", "before": 0, "predicted": predicted, "true": 0.1, "spread": {"a": spread}})
    report = guard.summarise(plans, margin=0.5, seed=0)
    assert report["exploits"]["mean"] == pytest.approx(0.4)
    found = report["guards"]["a"]
    assert found["limit"] == pytest.approx(0.19)
    assert (found["recall"]["mean"], found["false_alarms"]["mean"]) == (0.5, pytest.approx(1 / 3))
    assert found["auc"] == pytest.approx(5 / 6)
