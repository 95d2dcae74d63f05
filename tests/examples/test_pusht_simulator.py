"""Simulator, policies and poses of the Push-T example."""

import evaluate
import gymnasium
import numpy as np
import pytest
import shapely
import torch
from expert import Lookahead, outline, push_to_goal
from poses import one_pusher, pose_errors, read_poses, true_poses
from simulator import Simulator, hold_keys, jump_to_targets, push_about, push_at
from test_pusht import call, run

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.data import LeRobotFolder, read_video


def test_simulator_matches_gym_pusht():
    environment = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels", disable_env_checker=True).unwrapped
    simulator = Simulator()
    state = first = simulator.reset(8)
    frame, info = environment.reset(seed=8)
    pusher = push_at(np.random.default_rng(8), state)
    action = next(pusher)
    for _ in range(40):
        assert np.array_equal(simulator.frame(), frame)
        assert np.array_equal(state.agent, info["pos_agent"])
        assert np.array_equal(state.block, info["block_pose"])
        state = simulator.step(action)
        frame, *_, info = environment.step(action.astype(np.float64))
        action = pusher.send(state)
    assert np.linalg.norm(state.block - first.block) > 5  # the block was pushed


@pytest.mark.parametrize("radius", [15.0, 22.0, 30.0])
def test_pusher_radius_changes_collisions_and_frames(radius):
    simulator = Simulator(radius)
    state = first = simulator.reset(8)
    for target in np.linspace(state.agent, state.block_centre, 60):
        state = simulator.step(target)
    frame = simulator.frame()
    assert np.linalg.norm(state.block[:2] - first.block[:2]) > 5
    gap = shapely.Polygon(outline(state.block)).distance(shapely.Point(state.agent))
    assert gap == pytest.approx(radius, abs=1)
    blue = frame[..., 2].astype(int) - frame[..., 0] > 100
    assert blue.sum() == pytest.approx(np.pi * (radius * 96 / 512) ** 2, rel=0.2)
    read = read_poses(frame[None], radius)
    errors = pose_errors(read, true_poses(state.agent[None], state.block[None]))
    assert errors["pusher"] < 0.4
    assert errors["block_centre"] < 0.5


def test_lookahead_matches_simulator():
    simulator = Simulator()
    state = simulator.reset(8)
    for _ in range(15):
        state = simulator.step(state.agent)  # let the pusher come to rest
    targets = state.agent + np.linspace(0, 1, 20)[:, None] * (state.block_centre - state.agent) * 1.2
    expected = np.stack([simulator.step(target).block for target in targets])
    poses = Lookahead().run(state.agent, state.block, targets)
    assert np.abs(expected[-1] - state.block).max() > 5  # the block was pushed
    np.testing.assert_allclose(poses, expected, atol=1e-3)


def test_expert_reaches_goal():
    reached = 0
    for seed in (3, 10, 14, 18):
        simulator = Simulator()
        state = simulator.reset(seed)
        pusher = push_to_goal(np.random.default_rng(seed), state)
        action = next(pusher)
        for _ in range(200):
            state = simulator.step(action)
            if simulator.environment._get_coverage() > 0.95:
                reached += 1
                break
            action = pusher.send(state)
    assert reached >= 3


def test_frames_do_not_show_the_action():
    simulator = Simulator()
    simulator.reset(3)
    simulator.step(np.array([300.0, 200.0]))
    before = simulator.frame()
    simulator.environment._last_action = np.array([50.0, 450.0])
    assert np.array_equal(simulator.frame(), before)


@pytest.mark.parametrize("policy", [push_about, push_at])
def test_pushers_stay_in_arena_and_touch_block(policy):
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


def test_driven_episodes_match_space_controls():
    """The target moves 32 units per step at speed 1 in the keys' directions, and stays in the arena."""
    for speed in evaluate.SPEEDS:
        actions, frames, states = evaluate.driven_episodes(2, speed, 15.0)
        assert (actions.shape, frames.shape, states.shape) == ((2, 60, 2), (2, 61, 96, 96, 3), (2, 61, 5))
        moves = np.abs(np.diff(np.concatenate([states[:, :1, :2], actions], axis=1), axis=1))
        inside = (actions > 0) & (actions < 512)
        assert np.isin(moves[inside].round(3), [0, 32 * speed]).all()
        assert 0 <= actions.min() < actions.max() <= 512
    assert np.array_equal(actions, evaluate.driven_episodes(2, speed, 15.0)[0])
    _, frames, states = evaluate.driven_episodes(4, 0.25, 15.0)
    perfect = evaluate.driving_figures(
        frames[:, 1:] / 255, frames[:, 1:], states[:, 1:], np.random.default_rng(0), 15.0
    )
    assert perfect["one_pusher"]["mean"] == 1
    assert perfect["last_5_frames"]["pusher"]["median"] < 0.5
    assert perfect["last_5_frames"]["block_centre"]["median"] < 0.5
    gone = evaluate.driving_figures(
        np.ones((4, 60, 96, 96, 3)), frames[:, 1:], states[:, 1:], np.random.default_rng(0), 15.0
    )
    assert gone["one_pusher"]["mean"] == 0
    assert gone["last_5_frames"]["pusher"]["median"] == 96


def test_one_pusher_rejects_zero_and_two():
    simulator = Simulator()
    frames = []
    for seed in range(40):
        state = simulator.reset(seed)
        if not 80 < state.agent[0] < 200 or np.linalg.norm(state.agent - state.block_centre) < 140:
            continue
        frame = simulator.frame()
        both = np.minimum(frame, simulator.frame()[:, ::-1])
        column, row = (state.agent * 96 / 512).astype(int)
        none = frame.copy()
        none[row - 5 : row + 6, column - 5 : column + 6] = 255
        frames.append((frame, none, both))
    assert len(frames) > 3
    found = np.stack([one_pusher(np.stack(kind)) for kind in frames])
    assert found.T.tolist() == [[True] * len(frames), [False] * len(frames), [False] * len(frames)]


def test_held_keys_and_jumps_cover_arena():
    for policy, edges in ((hold_keys, 4), (jump_to_targets, 4)):
        targets, moved = [], 0
        for seed in range(6):
            simulator, rng = Simulator(), np.random.default_rng(seed)
            state = simulator.reset(seed)
            pusher = policy(rng, state)
            action, before = next(pusher), state.block
            for _ in range(100):
                targets.append(action)
                state = simulator.step(action)
                action = pusher.send(state)
            moved += not np.allclose(before, state.block)
        targets = np.stack(targets)
        assert targets.dtype == np.float32
        assert ((targets >= 0) & (targets <= 512)).all()
        assert (targets == 0).any(0).sum() + (targets == 512).any(0).sum() == edges
        assert moved >= 3


def test_embedded_model_keeps_untouched_regions():
    """Pixels away from the pusher stay almost unchanged over many short chunks."""
    pipeline = IRASimPipeline.from_pretrained(embedded_checkpoint())
    seen = read_video(embedded_checkpoint() / "example.mp4")[:2]
    start = (read_poses(seen).pusher[1] + 0.5) * 512 / 96
    # up, right past the block, then wait for the pusher to arrive
    steps = np.repeat([[0, -20], [20, 0], [0, 0]], [12, 14, 6], axis=0)
    actions = start + np.cumsum(steps, axis=0)
    stream = pipeline.stream(
        seen, actions, chunk_length=2, output_type="np", generator=torch.Generator().manual_seed(0)
    )
    last = list(stream)[-1]
    way = np.concatenate([read_poses(seen).pusher, actions * 96 / 512 - 0.5])
    places = np.stack(np.meshgrid(np.arange(96), np.arange(96)), axis=-1)
    still = (np.linalg.norm(places[:, :, None] - way, axis=-1) > 8).all(axis=-1)
    assert np.linalg.norm(read_poses(last[None]).pusher[0] - way[-1]) < 2
    assert np.square(last[still] - seen[1][still] / 255).mean() < 10**-3.4  # PSNR above 34 dB


def test_two_processes_collect_the_same_episodes_as_one(tmp_path):
    shares = ["--aimless", 1, "--expert", 0, "--noisy", 0, "--keys", 0, "--jumps", 0, "--episodes", 51, "--length", 4]
    run("pusht/collect.py", "--output", tmp_path / "two", "--num_workers", 2, *shares)
    call("collect", "--output", tmp_path / "one", "--num_workers", 1, *shares)
    for one, two in zip(LeRobotFolder(tmp_path / "one"), LeRobotFolder(tmp_path / "two"), strict=True):
        assert np.array_equal(one.frames, two.frames)
        assert np.array_equal(one.actions, two.actions)
