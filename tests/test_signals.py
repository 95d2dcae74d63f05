"""Ctrl-C and SIGTERM during every command that writes: one line, nothing half-written, and the same command works afterwards."""

import json
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import tiny_pipeline, tiny_vae
from test_conversion import latte_model

from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel
from irasim_diffusers.cli import main
from irasim_diffusers.data import LeRobotFolder, lerobot_writer, write_video

pytestmark = pytest.mark.usefixtures("offline")

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
SIZES = ["num_attention_heads=2", "action_dim=3", "sample_height=4", "sample_width=6"]
DATA = ["--dataset", "data", "--fps", "5"]
COMMANDS = {  # arguments, object and method that the signal interrupts, number of the call
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
    "adapt": (["--model", "model", "--action-dim", "2"], IRASimPipeline, "save_pretrained", 1),
    "convert": (
        ["--source", "latte", "--checkpoint", "latte", "--vae", "model:vae", "--config", *SIZES],
        IRASimPipeline,
        "save_pretrained",
        1,
    ),
}
OUTPUTS = {"plan": "out.mp4"}
RESUMED = ("evaluate",)
"""Commands that keep what they have finished."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("signals"), np.random.default_rng(0)
    tiny_pipeline(num_inference_steps=1).save_pretrained(root / "model")
    tiny_vae().save_pretrained(root / "vae")
    latte_model(heads=2, head=6, depth=1, patch=2, channels=4, frames=4).save_pretrained(root / "latte")
    PIL.Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(root / "frame.png")
    (root / "data/annotation/train").mkdir(parents=True)
    for number in range(2):
        write_video(root / f"data/videos/{number}.mp4", rng.integers(0, 256, (16, 8, 12, 3), dtype=np.uint8), 5, True)
        annotation = {"actions": rng.normal(size=(15, 3)).tolist(), "video_path": f"videos/{number}.mp4"}
        (root / f"data/annotation/train/{number}.json").write_text(json.dumps(annotation))
    return root


def raise_at_call(monkeypatch, owner, name, number, sent):
    """Send a signal to this process when a function has been called so often; return the calls."""
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
    """Ctrl-C raises KeyboardInterrupt, also if the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_signals_leave_nothing_half_written(workspace, monkeypatch, tmp_path, capfd, command):
    monkeypatch.chdir(workspace)
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
