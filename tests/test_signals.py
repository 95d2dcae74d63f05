"""Ctrl-C and SIGTERM during every command that writes: one line and nothing half-written.

The same command works afterward.
"""

import json
import signal
from pathlib import Path

import gymnasium
import numpy as np
import PIL.Image
import pytest
from gymnasium.envs.registration import EnvSpec
from test_latte import latte_model
from tiny_models import tiny_pipeline

from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel
from irasim_diffusers.cli import main
from irasim_diffusers.data import LeRobotFolder, lerobot_writer, read_video, write_video
from irasim_diffusers.policies import ChunkPolicy
from irasim_diffusers.rewards import FrameRegressor

pytestmark = pytest.mark.usefixtures("offline")

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
SIZES = ["num_attention_heads=2", "action_dim=3", "sample_height=4", "sample_width=6"]
DATA = ["--dataset", "data", "--fps", "5"]
COMMANDS = {  # arguments; object, function and number of the call that ends with the signal
    "data": ([*DATA], lerobot_writer, "image_statistics", 2),
    "evaluate": (["--model", "model", *DATA, "--split", "train"], IRASimTransformer3DModel, "forward", 6),
    "plan": (
        [
            "--model",
            "model",
            "--frames",
            "frame.png",
            "--goal",
            "frame.png",
            "--horizon",
            "3",
            "--candidates",
            "3",
            "--iterations",
            "2",
        ],
        IRASimTransformer3DModel,
        "forward",
        3,
    ),
    "generate": (
        ["--model", "model", "--frames", "frame.png", "--actions", "actions.npy"],
        IRASimTransformer3DModel,
        "forward",
        1,
    ),
    "play": (
        ["--model", "model", "--frames", "frame.png", "--script", "w*4", "--chunk-length", "1"],
        IRASimTransformer3DModel,
        "forward",
        3,
    ),
    "evaluate-policies": (
        [
            *("--model", "model", "--reward", "reward", "--env", "Noise-v0", "--device", "cpu"),
            *("--policies", "none", "--loader", "test_signals:load_policy", "--max-episode-steps", "2"),
            *("--num-episodes", "2", "--batch-size", "1"),
        ],
        IRASimTransformer3DModel,
        "forward",
        1,
    ),
    "adapt": (["--model", "model", "--action-dim", "2"], IRASimPipeline, "save_pretrained", 1),
    "convert": (
        ["--source", "latte", "--checkpoint", "latte", "--vae", "model:vae", "--config", *SIZES],
        IRASimPipeline,
        "save_pretrained",
        1,
    ),
}
OUTPUTS = dict.fromkeys(("plan", "generate", "play"), "out.mp4")
RESUMED = ("evaluate", "play")
"""Commands that have results to keep when the signal arrives."""


class Noise(gymnasium.Env):
    """Real environment with random frames."""

    observation_space = gymnasium.spaces.Dict({"pixels": gymnasium.spaces.Box(0, 255, (8, 12, 3), np.uint8)})
    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {"is_success": False}


def load_policy(path, action_space):
    return ChunkPolicy(lambda observation: np.zeros((len(observation["pixels"]), 3)), action_space)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("signals"), np.random.default_rng(0)
    tiny_pipeline(num_inference_steps=1).save_pretrained(root / "model")
    FrameRegressor(8, 12, channels=(4,), feature_dim=4).save_pretrained(root / "reward")
    np.save(root / "actions.npy", np.zeros((15, 3)))
    latte_model(heads=2, head=6, depth=1, patch=2, channels=4, frames=4).save_pretrained(root / "latte")
    PIL.Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(root / "frame.png")
    (root / "data/annotation/train").mkdir(parents=True)
    for number in range(2):
        write_video(root / f"data/videos/{number}.mp4", rng.integers(0, 256, (16, 8, 12, 3), dtype=np.uint8), 5, True)
        annotation = {"actions": rng.normal(size=(15, 3)).tolist(), "video_path": f"videos/{number}.mp4"}
        (root / f"data/annotation/train/{number}.json").write_text(json.dumps(annotation))
    return root


def raise_at_call(monkeypatch, owner, name, number, sent):
    """Patch a function so that its call `number` ends with a signal; return the list of calls."""
    original, calls = getattr(owner, name), []

    def call(*arguments, **options):
        result = original(*arguments, **options)
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(sent)
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.fixture(autouse=True)
def ctrl_c():
    """Make Ctrl-C raise KeyboardInterrupt, even in background jobs of a shell, which ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_signals_leave_nothing_half_written(workspace, monkeypatch, tmp_path, capfd, command):
    monkeypatch.chdir(workspace)
    monkeypatch.setitem(gymnasium.registry, "Noise-v0", EnvSpec("Noise-v0", Noise))
    arguments, owner, name, number = COMMANDS[command]
    argv = [command, *arguments, "--output", str(tmp_path / OUTPUTS.get(command, "out"))]
    before = sorted(workspace.rglob("*"))
    for sent, status, message in SIGNALS:
        with monkeypatch.context() as patch:
            calls = raise_at_call(patch, owner, name, number, sent)
            assert main(argv) == status
        assert len(calls) == number
        captured = capfd.readouterr()
        assert captured.err.splitlines()[-1] == f"irasim: {message}"
        assert "Traceback" not in captured.err
        assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]
        if command not in RESUMED:
            assert list(tmp_path.iterdir()) == []
        if command == "play":
            assert captured.out.startswith("frames predicted: 2; wrote ")
            assert len(read_video(tmp_path / "out.mp4")) == len(np.load(tmp_path / "out.npy")) + 1 == 3
    assert main(argv) == 0
    assert sorted(workspace.rglob("*")) == before
    if command == "data":
        assert [len(episode) for episode in LeRobotFolder(tmp_path / "out")] == [16, 16]
    if command == "evaluate":
        assert json.loads(Path(tmp_path / "out/report.json").read_text())["n"] == 2


def test_finished_files_are_kept_by_data(workspace, monkeypatch, tmp_path, capfd):
    """An interrupted conversion resumes after the files that are complete."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("irasim_diffusers.data.publish.EPISODES_PER_FILE", 1)
    argv = ["data", *DATA, "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        raise_at_call(patch, lerobot_writer, "image_statistics", 2, signal.SIGTERM)
        assert main(argv) == 143
    files = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [".irasim-source.json", "file-000.mp4", "file-000.parquet", "file-000.parquet"]
    calls = raise_at_call(monkeypatch, lerobot_writer, "image_statistics", 0, signal.SIGTERM)
    assert main(argv) == 0
    assert len(calls) == 1
    assert len(LeRobotFolder(tmp_path / "out")) == 2
