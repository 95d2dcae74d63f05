"""The Push-T example end to end: the real simulator, `accelerate launch`, tiny networks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from collect import TASKS
from expert import Lookahead, push_to_goal
from huggingface_hub import DatasetCard
from poses import pose_errors, read_poses, true_poses
from simulator import Simulator, push_about, push_at

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.data import LeRobotFolder

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "12", "--train_batch_size", "4"]
SPACE = ["--action_offset", "256", "--action_scale", "0.03125", "--action_space", "absolute"]


def run(script, *arguments, launch=None):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *launch] if launch else [sys.executable]
    command += [str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


ONE = ["--num_processes", "1"]
TWO = ["--num_processes", "2"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("pusht")
    run("pusht/collect.py", "--output", root / "set", "--episodes", 3, "--length", 60, "--first_seed", 5)
    run(
        *("train_vae.py", "--dataset", root / "set", "--output_dir", root / "vae", "--max_train_steps", 6),
        *("--block_out_channels", 32, 32, 32, 32, "--checkpointing_steps", 3, "--validation_steps", 3),
        *("--frames_per_episode", 5, "--train_batch_size", 4),
        launch=ONE,
    )
    return root


def train(root, output, *arguments, launch=ONE):
    return run(
        *("train.py", "--dataset", root / "set", "--vae", root / "vae", "--output_dir", root / output, *SIZES, *SPACE),
        *("--cache_dir", root / "latents", "--prediction_type", "v_prediction", "--num_history_frames", 2, *arguments),
        launch=launch,
    )


def weights(folder):
    return IRASimPipeline.from_pretrained(folder).transformer.state_dict()


def test_collected_episodes_are_the_simulators(workspace):
    folder = LeRobotFolder(workspace / "set")
    assert (len(folder), folder.fps, folder.info["robot_type"]) == (3, 10, "gym_pusht")
    simulator = Simulator()
    for number, episode in enumerate(folder):
        frames, states = simulator.replay(5 + number, episode.actions[:-1])
        assert np.array_equal(frames, episode.frames)
        blocks = np.stack([state.block for state in states]).astype(np.float32)
        assert np.array_equal(blocks, episode.states["observation.environment_state"])


def test_collecting_again_goes_on_where_it_stopped(workspace):
    video = workspace / "set" / "videos" / "observation.image" / "chunk-000" / "file-000.mp4"
    before = video.stat().st_mtime_ns
    run("pusht/collect.py", "--output", workspace / "set", "--episodes", 3, "--length", 60, "--first_seed", 5)
    assert video.stat().st_mtime_ns == before


def test_the_card_counts_the_pushers(workspace):
    card = DatasetCard.load(workspace / "set" / "README.md")
    tasks = [row["tasks"][0] for row in LeRobotFolder(workspace / "set").rows]
    for kind, task in TASKS.items():
        assert f"| {kind} | {tasks.count(task)} |" in card.text
    assert "LeRobot" in card.data.tags


def test_lookahead_is_the_simulator():
    simulator = Simulator()
    state = simulator.reset(8)
    for _ in range(15):
        state = simulator.step(state.agent)  # comes to rest
    targets = state.agent + np.linspace(0, 1, 20)[:, None] * (state.block_centre - state.agent) * 1.2
    expected = np.stack([simulator.step(target).block for target in targets])
    poses = Lookahead().run(state.agent, state.block, targets)
    assert np.abs(expected[-1] - state.block).max() > 5  # it was pushed
    np.testing.assert_allclose(poses, expected, atol=1e-3)


def test_the_expert_reaches_the_goal():
    reached = 0
    for seed in (3, 10, 14, 18):
        simulator = Simulator()
        state = simulator.reset(seed)
        pusher = push_to_goal(np.random.default_rng(seed), state)
        action = next(pusher)
        for _ in range(200):
            state = simulator.step(action)
            action = pusher.send(state)
        reached += simulator.environment._get_coverage() > 0.95
    assert reached >= 3


def test_poses_are_read_from_pixels(workspace):
    for episode in LeRobotFolder(workspace / "set"):
        read = read_poses(episode.frames[::6])
        true = true_poses(episode.states["observation.state"], episode.states["observation.environment_state"])
        true = type(true)(true.pusher[::6], true.block[::6])
        assert read.found.all()
        errors = pose_errors(read, true)
        assert np.median(errors["pusher"]) < 0.2
        assert np.median(errors["block_centre"]) < 0.3
        assert np.median(errors["block_angle"]) < 1
        assert errors["block_centre"].max() < 1


def test_what_is_no_pose_is_not_found(workspace):
    frame = LeRobotFolder(workspace / "set")[0].frames[0]
    pale = (frame // 2 + 127).astype(np.uint8)
    halves = np.where(np.arange(96)[:, None, None] % 8 < 4, frame, 255).astype(np.uint8)
    read = read_poses(np.stack([np.full_like(frame, 255), pale, halves]))
    assert not read.found.any()
    assert np.isnan(read.block[0]).all()
    assert np.isnan(read.pusher[0]).all()


def test_frames_do_not_show_the_action():
    simulator = Simulator()
    simulator.reset(3)
    simulator.step(np.array([300.0, 200.0]))
    before = simulator.frame()
    simulator.environment._last_action = np.array([50.0, 450.0])
    assert np.array_equal(simulator.frame(), before)


@pytest.mark.parametrize("policy", [push_about, push_at])
def test_pushers_stay_in_the_arena_and_touch_the_block(policy):
    touched = 0
    for seed in range(12):
        simulator = Simulator()
        state = first = simulator.reset(seed)
        pusher = policy(np.random.default_rng(seed), state)
        action = next(pusher)
        for _ in range(60):
            assert action.shape == (2,)
            assert (action >= 12).all()
            assert (action <= 500).all()
            state = simulator.step(action)
            action = pusher.send(state)
        touched += np.linalg.norm(state.block - first.block) > 5
    assert touched >= 4


def test_vae_is_ready_to_use(workspace):
    config = json.loads((workspace / "vae" / "config.json").read_text())
    assert 0.1 < config["scaling_factor"] < 100
    assert config["scaling_factor"] != 0.18215
    assert (workspace / "vae" / "checkpoints").is_dir()


@pytest.fixture(scope="module")
def trained(workspace):
    train(
        *(workspace, "whole", "--max_train_steps", 6, "--checkpointing_steps", 2, "--validation_steps", 6),
        *("--validation_dataset", workspace / "set", "--num_validation_clips", 2, "--validation_inference_steps", 2),
    )
    return workspace / "whole"


def test_training_writes_a_pipeline_that_holds_the_action_space(trained):
    config = IRASimPipeline.from_pretrained(trained).transformer.config
    assert (config.sample_height, config.sample_width, config.sample_frames) == (12, 12, 16)
    assert (config.action_dim, config.action_names, config.action_space) == (2, ["target_x", "target_y"], "absolute")
    assert (config.action_offset, config.action_scale, config.prediction_type) == (256, 0.03125, "v_prediction")
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_resuming_is_exact(workspace, trained):
    train(workspace, "parts", "--max_train_steps", 6, "--checkpointing_steps", 2)
    for name in ("checkpoint-6", "transformer"):
        path = workspace / "parts" / name
        path.rename(path.with_name(f"unused-{name}"))
    (workspace / "parts" / "partial-5").mkdir()  # a checkpoint that was being written
    output = train(workspace, "parts", "--max_train_steps", 6, "--checkpointing_steps", 2)
    assert "checkpoint-4" in output
    assert not (workspace / "parts" / "partial-5").exists()
    for name, tensor in weights(trained).items():
        assert torch.equal(weights(workspace / "parts")[name], tensor), name


def test_every_objective_and_optimiser_resumes_exactly(workspace):
    flags = ["--optimizer", "muon", "--window_lengths", 16, 8, 4, "--history_noise", 0.2, "--gradient_checkpointing"]
    flags += ["--state_keys", "observation.state", "observation.environment_state", "--state_angles", "block_angle"]
    train(workspace, "muon", "--max_train_steps", 4, "--checkpointing_steps", 4, *flags)
    train(workspace, "muon-parts", "--max_train_steps", 4, "--checkpointing_steps", 2, *flags)
    for name in ("checkpoint-4", "transformer"):
        path = workspace / "muon-parts" / name
        path.rename(path.with_name(f"unused-{name}"))
    assert "checkpoint-2" in train(workspace, "muon-parts", "--max_train_steps", 4, *flags)
    for name, tensor in weights(workspace / "muon").items():
        assert torch.equal(weights(workspace / "muon-parts")[name], tensor), name


def test_training_video_ada_as_a_flow(workspace):
    flags = ["--conditioning", "video", "--prediction_type", "flow_prediction"]
    train(workspace, "video", "--max_train_steps", 2, *flags)
    pipeline = IRASimPipeline.from_pretrained(workspace / "video")
    assert (pipeline.transformer.config.conditioning, pipeline.transformer.config.fps) == ("video", 10)
    pipeline(np.zeros((2, 96, 96, 3), np.uint8), np.zeros((14, 2)), num_inference_steps=1)


def test_training_on_two_processes(workspace):
    states = ["--state_keys", "observation.state"]
    train(workspace, "two", "--max_train_steps", 3, "--mixed_precision", "no", *states, launch=TWO)
    assert all(torch.isfinite(tensor).all() for tensor in weights(workspace / "two").values())


def test_evaluation_reports_every_figure(workspace, trained):
    report = workspace / "report.json"
    run(
        *("pusht/evaluate.py", "--model", trained, "--dataset", workspace / "set", "--output", report),
        *("--num_inference_steps", 1, "--num_clips", 2, "--num_histories", 1, "--first_seed", 5),
    )
    figures = json.loads(report.read_text())
    assert figures["clip_psnr"]["n"] == 2
    assert figures["identification"]["predictions"] == 8
    assert 0 <= figures["identification"]["mean"] <= 1
    assert "evaluate.py" in figures["setting"]["command"]
