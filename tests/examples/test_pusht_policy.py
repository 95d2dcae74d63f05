"""Reward network and diffusion policy of the Push-T example: real simulator, little training."""

import json
import sys

import collect
import numpy as np
import pytest
import torch
import train_policy
import train_reward
from diffusion_policy import DiffusionPolicy
from simulator import Simulator

from irasim_diffusers.rewards import FrameRegressor


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Two expert episodes and one of another policy, 40 frames each."""
    root = tmp_path_factory.mktemp("demonstrations")
    with pytest.MonkeyPatch.context() as patch:
        shares = ["--aimless", 0.3, "--expert", 0.7, "--noisy", 0, "--keys", 0, "--jumps", 0]
        flags = ["--output", root / "set", "--episodes", 3, "--length", 40, "--first_seed", 3, "--num_workers", 1]
        run(collect, patch, *flags, *shares)
    return root / "set"


def test_iou_agrees_with_the_coverage_of_the_simulator():
    simulator = Simulator()
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(4):
        state = simulator.reset(seed)
        for _ in range(3):
            block = np.array([256.0, 256.0, np.pi / 4]) + generator.normal(size=3) * [20, 20, 0.3]
            simulator.environment._set_state([*state.agent, *block])
            state = simulator.step(state.agent)
            coverage = simulator.environment._get_coverage()
            iou = train_reward.ious(state.block[None])[0]
            assert 2 * iou / (1 + iou) == pytest.approx(coverage, abs=1e-6)
            covered += coverage > 0.5
    assert covered


def test_closeness_is_dense():
    blocks = np.array([[256, 256, np.pi / 4], [200, 256, np.pi / 4], [100, 256, np.pi / 4], [40, 40, 2.0]])
    assert train_reward.labels(blocks, "iou")[2:].tolist() == [0, 0]
    values = train_reward.labels(blocks, "closeness")
    assert values[0] == 1
    assert values[1] == pytest.approx(1 - 56 / 256)
    assert (np.diff(values) < -0.1).all()


def test_augmented_frames_stay_similar_and_in_range():
    torch.manual_seed(0)
    frames = torch.rand(16, 3, 96, 96)
    changed = train_reward.augment(frames)
    assert 0 <= changed.min() < changed.max() <= 1
    assert 0.01 < (changed - frames).square().mean().sqrt() < 0.2


def test_reward_script(demonstrations, tmp_path, monkeypatch):
    flags = ["--dataset", demonstrations, "--test_dataset", demonstrations, "--output_dir", tmp_path]
    flags += ["--max_train_steps", 3, "--batch_size", 8, "--frames_per_episode", 5, "--target", "closeness"]
    with pytest.raises(
        ValueError, match="must have at least 1002 frames, got 40: use a smaller `num_predicted_frames`"
    ):
        run(train_reward, monkeypatch, *flags, "--num_clips", 2, "--num_predicted_frames", 1000)
    assert not list(tmp_path.iterdir())
    run(train_reward, monkeypatch, *flags, "--num_clips", 2, "--num_predicted_frames", 2)
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("simulator_frames", "simulator_last_frame", "model_frames", "model_last_frame"):
        assert 0 <= report[name]["low"] <= report[name]["mean"] <= report[name]["high"] < 1
        assert report[name]["n"] == 2
    network = FrameRegressor.from_pretrained(tmp_path)
    assert network.config.target == "closeness"
    assert network(torch.rand(2, 4, 3, 96, 96)).shape == (2, 4)
    weights = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "report.json").unlink()
    flags[flags.index("--max_train_steps") + 1] = 0  # writes only the report
    run(train_reward, monkeypatch, *flags, "--num_clips", 2, "--num_predicted_frames", 2)
    assert json.loads((tmp_path / "report.json").read_text())["model_frames"]["mean"] == report["model_frames"]["mean"]
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_chunks_follow_the_frames(demonstrations):
    arguments = train_policy.PolicyArguments([demonstrations], demonstrations)
    frames, positions, chunks = train_policy.demonstrations(arguments, 16)
    experts = [row for row in collect.LeRobotFolder(demonstrations).rows if row["tasks"][0] == collect.TASKS["expert"]]
    assert 0 < len(experts) < 3
    assert len(frames) == len(positions) == len(chunks) == 40 * len(experts)
    assert torch.equal(chunks[0, 1:], chunks[1, :-1])
    assert torch.equal(chunks[39], chunks[39, :1].expand(16, 2))
    moves = (chunks[:30, 0] - positions[:30]).norm(dim=1)
    assert moves.max() < 100  # targets are near the pusher in the same frame
    weights = train_policy.sampling_weights(chunks)
    assert weights[0] == 1
    assert weights[39] == pytest.approx(0.1)


def test_mirror_images_show_mirrored_states():
    simulator = Simulator()
    state = simulator.reset(3)
    pusher, block = (torch.from_numpy(part) for part in (state.agent, state.block))
    mirrored_block = torch.cat([train_policy.mirror(block[:2]), np.pi / 2 - block[2:]]).numpy()
    frame = torch.from_numpy(simulator.frame()).movedim(-1, 0)
    physics = [*train_policy.mirror(pusher), 0, 0, *mirrored_block[:2], mirrored_block[2], 0, 0, 0]
    simulator.restore(np.array(physics))
    expected = torch.from_numpy(simulator.frame()).movedim(-1, 0)
    mirrored = train_policy.mirror_frames(frame)
    assert (mirrored.float() - expected.float()).abs().mean() < 2  # gray levels of 255; edges are not antialiased
    assert (frame.float() - expected.float()).abs().mean() > 5
    corners, expected_corners = (
        torch.from_numpy(train_policy.outline(pose)[train_policy.CORNERS]) for pose in (state.block, mirrored_block)
    )
    torch.testing.assert_close(train_policy.mirror(corners)[train_policy.MIRRORED], expected_corners)


def test_encoder_learns_keypoints_also_of_mirror_images(demonstrations, tmp_path, monkeypatch):
    """The error falls below 80 % of that of the mean position of each keypoint."""
    monkeypatch.setattr(train_policy, "ENCODER_BATCH", 24)
    arguments = train_policy.PolicyArguments([demonstrations], tmp_path, encoder_steps=20, encoder_episodes=2)
    training = train_policy.Training(arguments)
    frames, keypoints = train_policy.labelled_frames(arguments)
    assert frames.shape == (96, 3, 96, 96)
    training.fit_encoder(frames, keypoints)
    found = training.find_keypoints(frames)
    assert found.shape == (192, 4, 2)
    truth = torch.cat([keypoints, train_policy.mirror(keypoints)[:, train_policy.MIRRORED]])
    error, spread = ((part - truth).norm(dim=-1).mean() for part in (found, truth.mean(0)))
    assert error < 0.8 * spread


def test_gradients_that_are_not_finite_raise(tmp_path):
    training = train_policy.Training(train_policy.PolicyArguments([tmp_path], tmp_path, encoder_steps=1))
    frames, keypoints = torch.zeros(2, 3, 96, 96, dtype=torch.uint8), torch.full((2, 4, 2), torch.nan)
    with pytest.raises(FloatingPointError, match="the gradient norm of the encoder is nan at step 1: check the data"):
        training.fit_encoder(frames, keypoints)


def test_policy_script(demonstrations, tmp_path, monkeypatch):
    flags = ["--datasets", demonstrations, "--output_dir", tmp_path, "--batch_size", 8, "--stages", 2, 3]
    flags += ["--encoder_steps", 2]
    run(train_policy, monkeypatch, *flags, "--num_episodes", 2, "--max_episode_steps", 10)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["3"]["max_iou"]["n"] == 2
    first, second = (DiffusionPolicy.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (2, 3))
    assert not torch.equal(first.proj_in.weight, second.proj_in.weight)


def test_policy_training_resumes_with_the_same_result(demonstrations, tmp_path, monkeypatch):
    flags = ["--datasets", demonstrations, "--batch_size", 4, "--stages", 2, 4, "--num_episodes", 0]
    flags += ["--encoder_steps", 2]
    run(train_policy, monkeypatch, *flags, "--output_dir", tmp_path / "whole")
    original = train_policy.Training.update

    def interrupted(training, *data):
        if training.step == 3:
            raise KeyboardInterrupt
        return original(training, *data)

    monkeypatch.setattr(train_policy.Training, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(train_policy, monkeypatch, *flags, "--output_dir", tmp_path / "parts")
    monkeypatch.setattr(train_policy.Training, "update", original)
    assert not (tmp_path / "parts" / "checkpoint-4").exists()
    run(train_policy, monkeypatch, *flags, "--output_dir", tmp_path / "parts")
    whole, parts = (DiffusionPolicy.from_pretrained(tmp_path / name / "checkpoint-4") for name in ("whole", "parts"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"contains a run with other settings: seed was 0\."):
        run(train_policy, monkeypatch, *flags, "--seed", 1, "--output_dir", tmp_path / "parts")


def test_samples_are_repeatable_and_within_the_arena():
    torch.manual_seed(0)
    policy = DiffusionPolicy(width=32, num_blocks=1).eval()
    observation = {
        "pixels": torch.randint(256, (2, 96, 96, 3), dtype=torch.uint8),
        "agent_pos": np.array([[9, 8], [500, 256]]),
    }
    samples = policy.sample(observation, 5, torch.Generator().manual_seed(1))
    assert samples.shape == (2, 5, 16, 2)
    assert 0 <= samples.min() < samples.max() <= 512
    assert torch.equal(samples, policy.sample(observation, 5, torch.Generator().manual_seed(1)))
    assert not torch.equal(samples[:, 0], samples[:, 1])


def test_policy_learns_the_targets_of_a_frame():
    """The chunks depend on the brightness of the frame and are relative to the pusher."""
    torch.manual_seed(0)
    policy = DiffusionPolicy(channels=(8, 8), width=64, num_blocks=2, condition_dim=32)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    scheduler = policy.scheduler()
    bright = torch.tensor([0.0, 1.0]).repeat(8)
    frames = bright[:, None, None, None].expand(16, 3, 96, 96)
    clean = (2 * bright - 1)[:, None, None].expand(16, 16, 2)
    for _ in range(400):
        positions = 100 + 300 * torch.rand(16, 2)
        noise, timesteps = torch.randn(16, 16, 2), torch.randint(100, (16,))
        predicted = policy(scheduler.add_noise(clean, noise, timesteps), timesteps, policy.encode(frames, positions))
        loss = (predicted - clean).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pixels = (frames[:2].movedim(1, -1) * 255).byte()
    samples = policy.eval().sample({"pixels": pixels, "agent_pos": np.full((2, 2), 250)}, 4)
    expected = torch.tensor([150.0, 350.0])[:, None, None, None].expand_as(samples)
    torch.testing.assert_close(samples, expected, atol=20, rtol=0)


BAD = [
    (train_reward, ["--target", "speed"], "`target` must be one of iou, closeness, got 'speed'"),
    (train_reward, ["--num_predicted_frames", "0"], "`num_predicted_frames` must be at least 1, got 0"),
    (train_reward, ["--batch_size", "0"], "`batch_size` must be at least 1, got 0"),
    (train_reward, ["--max_train_steps", "-1"], "`max_train_steps` must be at least 0, got -1"),
    (train_reward, ["--learning_rate", "nan"], "`learning_rate` must be finite"),
    (
        train_policy,
        ["--stages", "4", "4"],
        r"`stages` must be positive numbers of steps in increasing order, got \[4, 4\]",
    ),
    (train_policy, ["--stages", "0"], "`stages` must be positive"),
    (train_policy, ["--num_executed", "17"], "`num_executed` must be at most 16, got 17"),
    (train_policy, ["--encoder_steps", "0"], "`encoder_steps` must be at least 1"),
    (train_policy, ["--ema_decay", "nan"], "`ema_decay` must be finite"),
    (train_policy, ["--ema_decay", "2"], r"`ema_decay` must be in \[0, 1\], got 2"),
    (train_policy, ["--num_episodes", "-5"], "`num_episodes` must be at least 0, got -5"),
    (train_policy, ["--seed", "-1"], "`seed` must be at least 0, got -1"),
    (train_policy, ["--max_demonstrations", "0"], "`max_demonstrations` must be at least 1"),
]


@pytest.mark.parametrize("flags", [[], ["--model", "org/name"]])
def test_reward_is_stored_only_in_a_given_folder(flags, monkeypatch):
    with pytest.raises(ValueError, match=r"`output_dir` is required unless .*: pass --output_dir .*, or --model"):
        run(train_reward, monkeypatch, "--dataset", "nowhere", *flags)


@pytest.mark.parametrize(("script", "change", "message"), BAD)
def test_bad_arguments_raise_before_any_work(script, change, message, tmp_path, monkeypatch):
    name = "--dataset" if script is train_reward else "--datasets"
    monkeypatch.setattr(train_policy, "Training", None)  # must not be created
    with pytest.raises(ValueError, match=message):
        run(script, monkeypatch, name, "nowhere", "--output_dir", tmp_path / "out", *change)
    assert not (tmp_path / "out").exists()
