"""Interrupted and resumed training runs."""

import dataclasses
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from fork_server import fork_server
from test_pusht import EXAMPLES, call
from test_train import MODEL, SHORT, TWO, train_robot, write_workspace
from train import TrainingArguments

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.training import newest_checkpoint
from irasim_diffusers.training.arguments import MAY_CHANGE

STEPS = 40  # steps of the run that is killed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("robots"))


def test_resuming_with_other_settings_raises(workspace):
    train_robot(workspace, "settled")
    with pytest.raises(ValueError, match=r"run with other settings: learning_rate was 0\.0001 and is 1e-05"):
        # the settings are checked before the data are opened
        train_robot(workspace, "settled", "--learning_rate", 1e-5, "--dataset", "missing")
    train_robot(workspace, "settled", "--logging_steps", 1, "--max_train_steps", 4)
    weights = (workspace / "settled" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"`max_train_steps` must be at least 4, the step of '.*checkpoint-4', got 3"):
        train_robot(workspace, "settled", "--max_train_steps", 3, "--dataset", "missing")
    train_robot(workspace, "settled", "--max_train_steps", 4)  # only writes the pipeline again
    assert (workspace / "settled" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    settings = json.loads((workspace / "settled" / "checkpoint-4" / "settings.json").read_text())
    flags = {each.name for each in dataclasses.fields(TrainingArguments)}
    assert flags & settings.keys() == flags - MAY_CHANGE
    for name in flags & settings.keys():
        with pytest.raises(ValueError, match=f"run with other settings: {name} was"):
            newest_checkpoint(workspace / "settled", {name: "another"})


def test_damaged_checkpoint_is_skipped(workspace):
    output = workspace / "damaged"
    train_robot(workspace, "damaged", "--max_train_steps", 4)
    whole = shutil.copytree(output / "checkpoint-4", workspace / "whole")
    for name in ("settings.json", "model.safetensors", "optimizer.bin", "ema.safetensors", "random_states_0.pkl"):
        (output / "checkpoint-4" / name).write_bytes(b"")  # a power failure can leave an empty file
        assert newest_checkpoint(output, {}) == output / "checkpoint-2", name
        shutil.copy(whole / name, output / "checkpoint-4" / name)
    (output / "checkpoint-4" / "model.safetensors").unlink()
    log = train_robot(workspace, "damaged", "--max_train_steps", 4)
    assert f"skipped damaged checkpoint {output / 'checkpoint-4'}: model.safetensors is missing" in log
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert newest_checkpoint(output, {}) == output / "checkpoint-4"
    for step in (2, 4):
        (output / f"checkpoint-{step}" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: checkpoint-4 \(optimizer.bin has 0 bytes"):
        newest_checkpoint(output, {})


def test_sigterm_saves_a_checkpoint(workspace):
    output = workspace / "terminated"
    command = [EXAMPLES / "train.py", "--dataset", workspace / "first", "--vae", workspace / "vae"]
    command += ["--output_dir", output, "--cameras", 0, 1, *MODEL, *SHORT, "--max_train_steps", 100_000]
    command += ["--checkpointing_steps", 100_000, "--logging_steps", 1]
    process = fork_server().start(*command)
    process.wait_for("loss=")  # the training loop runs
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step" in process.stderr
    assert "Traceback" not in process.stderr
    assert len(list(output.glob("checkpoint-*"))) == 1


def test_sigterm_of_the_launcher_saves_a_checkpoint_of_two_processes(workspace):
    """After SIGTERM to `accelerate launch`, two processes with the same flags and fewer steps resume."""
    output = workspace / "preempted"
    command = ["-m", "accelerate.commands.launch", *TWO, EXAMPLES / "train.py"]
    command += [
        "--dataset",
        workspace / "first",
        "--vae",
        workspace / "vae",
        "--output_dir",
        output,
        "--cameras",
        0,
        1,
    ]
    command += [*MODEL, "--train_batch_size", 1, "--mixed_precision", "no", "--checkpointing_steps", 100_000]
    command += ["--cache_dir", workspace / "preempted-latents", "--logging_steps", 1]
    process = fork_server().start(*command, "--max_train_steps", 100_000)
    process.wait_for("loss=")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait()
    assert "stopped by SIGTERM at step" in process.stderr
    (checkpoint,) = output.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert not list(output.glob(".*.partial"))
    resumed, _ = fork_server().run_ranks(*command[2 + len(TWO) :], "--max_train_steps", step + 1)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from {checkpoint}" in resumed.stderr
    assert (output / "model_index.json").is_file()


def test_killed_and_resumed_run_matches_uninterrupted_run(workspace):
    """Checkpoints are written every step, so that a run may be killed while it writes one."""

    def arguments(output):
        return [
            *("train.py", "--dataset", workspace / "first", "--vae", workspace / "vae", "--output_dir", output),
            *("--cache_dir", workspace / "kill-latents", "--cameras", 0, 1, *MODEL, *SHORT),
            *("--max_train_steps", STEPS, "--checkpointing_steps", 1, "--gradient_accumulation_steps", 2),
        ]

    script, *flags = arguments(workspace / "steady")
    call(script.removesuffix(".py"), *flags)
    output, generator = workspace / "killed", np.random.default_rng(11)

    def newest():
        return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)

    reached = [0]
    for _ in range(3):
        script, *rest = arguments(output)
        process = fork_server().start(EXAMPLES / script, *rest)
        while process.poll() is None and newest() <= reached[-1]:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(newest())
    assert reached == sorted(set(reached)), "every run makes progress"
    assert reached[-1] < STEPS, "the last run was killed before the end"
    call(script.removesuffix(".py"), *arguments(output)[1:])
    expected, resumed = (
        IRASimPipeline.from_pretrained(folder).transformer for folder in (workspace / "steady", output)
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not list(output.glob("partial-*"))


def test_last_step_has_a_checkpoint(workspace):
    train_robot(workspace, "last", "--max_train_steps", 2, "--checkpointing_steps", 100)
    assert [path.name for path in (workspace / "last").glob("checkpoint-*")] == ["checkpoint-2"]
