import dataclasses
import struct
import warnings
import zlib

import gymnasium
import numpy as np
import PIL.Image
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from tiny_models import tiny_pipeline

from irasim_diffusers import ProprioceptionModel
from irasim_diffusers.actions import derive_actions
from irasim_diffusers.data import Episode
from irasim_diffusers.envs import (
    EpisodeStarts,
    Start,
    WorldModelEnv,
    WorldModelVectorEnv,
    load_world_model,
)

STEPS = {"sampling": {"num_inference_steps": 2}}
BOUNDS = {"action_low": [-2.0, -1.0, 0.0], "action_high": [2.0, 3.0, 5.0]}
ACTION = np.float32([[1.0, -0.5, 3.0]])


def brightness(frames):
    return frames.mean((-3, -2, -1))


def tiny_proprioception(low=-10.0, high=10.0):
    torch.manual_seed(0)
    limits = {"state_low": [low] * 2, "state_high": [high] * 2}
    return ProprioceptionModel(["x", "y"], state_offset=[1.0, 2.0], state_scale=[0.1, 0.2], **limits).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline(**BOUNDS)


@pytest.fixture(scope="module")
def starts():
    return np.random.default_rng(0).integers(0, 256, (5, 2, 8, 12, 3), dtype=np.uint8)


def close(pixels, others):
    """Assert equality up to rounding errors."""
    assert np.abs(pixels.astype(int) - others.astype(int)).max() <= 1


def actions_of(num_steps, num_envs=1):
    low, high = BOUNDS.values()
    return np.random.default_rng(4).uniform(low, high, (num_steps, num_envs, 3)).astype(np.float32)


def test_frames_are_those_of_the_pipeline(model, starts):
    env = WorldModelEnv(model, **STEPS)
    env.reset(seed=3, options={"frames": starts[1]})
    state = model.start(starts[1], env._rows._states[0].seeds)
    for (action,) in actions_of(4):
        observation, reward, terminated, truncated, info = env.step(action)
        with torch.no_grad():
            state, latents = model.advance(state, torch.from_numpy(action)[None, None], 2)
            expected = model.decode(latents)[0, 0]
        close(observation["pixels"], (255 * expected).round().byte().permute(1, 2, 0).numpy())
        assert (reward, terminated, truncated, info) == (0.0, False, False, {"is_success": False})


def test_seed_gives_the_same_episode_alone_and_in_a_batch(model, starts):
    rows, single = WorldModelVectorEnv(model, 3, starts, **STEPS), WorldModelEnv(model, starts, **STEPS)
    actions = actions_of(3, 3)
    together, _ = rows.reset(seed=[6, 9, 4])
    episodes = [together["pixels"], *(rows.step(step)[0]["pixels"] for step in actions)]
    for row, seed in enumerate([6, 9, 4]):
        alone, _ = single.reset(seed=seed)
        frames = [alone["pixels"], *(single.step(step[row])[0]["pixels"] for step in actions)]
        for frame, others in zip(frames, episodes, strict=True):
            close(frame, others[row])
    first, again, other = (rows.reset(seed=seed)[0]["pixels"] for seed in (6, 6, 60))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_seed_determines_the_noise(model, starts):
    rows = WorldModelVectorEnv(model, 2, starts[:1], **STEPS)
    rows.reset(seed=[1, 1])
    same = rows.step(np.repeat(ACTION, 2, 0))[0]["pixels"]
    close(same[0], same[1])
    rows.reset(seed=[1, 2])
    different = rows.step(np.repeat(ACTION, 2, 0))[0]["pixels"]
    close(same[0], different[0])
    assert np.abs(different[0].astype(int) - different[1]).max() > 5


@pytest.mark.parametrize("fresh", [1, 2])
def test_partial_reset(fresh, model, starts):
    """The new history may be shorter than that of the running rows."""
    rows, single = WorldModelVectorEnv(model, 2, starts, **STEPS), WorldModelEnv(model, starts, **STEPS)
    actions = actions_of(4, 2)
    rows.reset(seed=[5, 6])
    single.reset(seed=5)
    for step in actions[:2]:
        observation, *_ = rows.step(step)
        kept = single.step(step[0])[0]["pixels"]
    mask = np.array([False, True])
    reset, _ = rows.reset(seed=[0, 8], options={"reset_mask": mask, "frames": starts[2:3, :fresh]})
    np.testing.assert_array_equal(reset["pixels"][0], observation["pixels"][0])
    np.testing.assert_array_equal(reset["pixels"][1], starts[2, fresh - 1])
    close(reset["pixels"][0], kept)
    for step in actions[2:]:
        observation, *_ = rows.step(step)
        close(observation["pixels"][0], single.step(step[0])[0]["pixels"])
    assert rows._steps.tolist() == [4, 2]
    single.reset(seed=8, options={"frames": starts[2, :fresh]})
    for step in actions[2:]:
        expected, *_ = single.step(step[1])
    close(observation["pixels"][1], expected["pixels"])


def test_reward_success_and_the_end_of_an_episode(model, starts):
    env = WorldModelEnv(model, starts, reward=brightness, max_episode_steps=3, **STEPS)
    env.reset(seed=0)
    for step in range(3):
        observation, reward, terminated, truncated, info = env.step(ACTION[0])
        assert reward == pytest.approx(observation["pixels"].mean() / 255, abs=2e-3)
        assert (terminated, truncated) == (False, step == 2)
    with pytest.raises(ValueError, match="every episode has ended: call `reset`"):
        env.step(ACTION[0])
    env.reset()
    env.step(ACTION[0])
    env = WorldModelEnv(model, starts, success=lambda frames: brightness(frames) > -1, **STEPS)
    env.reset()
    _, _, terminated, truncated, info = env.step(ACTION[0])
    assert (terminated, truncated, info) == (True, False, {"is_success": True})


def first_row_succeeds():
    """Return a success function that is true for the first row at its second step."""
    calls = []

    def success(frames):
        calls.append(len(frames))
        return torch.arange(len(frames))[:, None].eq(0) & (sum(size > 0 for size in calls) == 3)

    return success


def test_disabled_autoreset_freezes_finished_rows(model, starts):
    rows = WorldModelVectorEnv(
        model, 2, starts, brightness, first_row_succeeds(), max_episode_steps=4, autoreset_mode="Disabled", **STEPS
    )
    assert rows.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    rows.reset(seed=0)
    results = [rows.step(step) for step in actions_of(4, 2)]
    assert [result[2].tolist() for result in results] == [[False] * 2] + [[True, False]] * 3
    assert [result[3].tolist() for result in results] == [[False] * 2] * 3 + [[False, True]]
    assert [result[4]["is_success"].tolist() for result in results] == [[False] * 2] + [[True, False]] * 3
    assert [bool(result[1][0]) for result in results] == [True, True, False, False]
    assert all(result[1][1] > 0 for result in results)
    for result in results[2:]:
        np.testing.assert_array_equal(result[0]["pixels"][0], results[1][0]["pixels"][0])
    with pytest.raises(ValueError, match="every episode has ended"):
        rows.step(actions_of(1, 2)[0])
    rows.reset(options={"reset_mask": np.array([True, False])})
    assert [bool(flag) for flag in rows.step(actions_of(1, 2)[0])[3]] == [False, True]


def test_next_step_autoreset(model, starts):
    rows = WorldModelVectorEnv(model, 2, starts, brightness, max_episode_steps=2, **STEPS)
    assert rows.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    rows.reset(seed=0)
    rows.reset(seed=[3, 3], options={"reset_mask": np.array([False, True])})
    step = actions_of(1, 2)[0]
    rows.step(step)
    rows.reset(options={"reset_mask": np.array([False, True])})
    assert rows.step(step)[3].tolist() == [True, False]
    observation, rewards, _, truncated, _ = rows.step(step)
    assert truncated.tolist() == [False, True]
    assert rewards[0] == 0 < rewards[1]
    assert any(np.array_equal(observation["pixels"][0], start[-1]) for start in starts)
    assert rows._steps.tolist() == [0, 2]


def test_same_step_autoreset(model, starts):
    rows = WorldModelVectorEnv(
        model, 2, starts, brightness, max_episode_steps=2, autoreset_mode=AutoresetMode.SAME_STEP, **STEPS
    )
    plain = WorldModelVectorEnv(model, 2, starts, brightness, autoreset_mode="Disabled", **STEPS)
    for env in (rows, plain):
        env.reset(seed=0)
    for step in actions_of(2, 2):
        observation, rewards, _, truncated, info = rows.step(step)
        expected, expected_rewards, *_ = plain.step(step)
    assert truncated.all()
    np.testing.assert_allclose(rewards, expected_rewards)
    assert info["final_info"]["is_success"].tolist() == [False, False]
    for row in range(2):
        np.testing.assert_array_equal(info["final_obs"][row]["pixels"], expected["pixels"][row])
        assert any(np.array_equal(observation["pixels"][row], start[-1]) for start in starts)


@pytest.mark.parametrize("derivation", ["relative_planar", "relative_euler", "relative_6d"])
def test_relative_poses_are_composed_from_the_first_state(derivation, starts):
    size = 2 if derivation == "relative_planar" else 7
    states = np.random.default_rng(1).uniform(-1, 1, (2, 5, size))  # (rows, frames, S)
    actions = np.stack([derive_actions(each, derivation) for each in states]).swapaxes(0, 1)
    width = actions.shape[-1]
    normalization = {"action_dim": width, "action_scale": 1.0, "action_offset": 0.0, "action_derivation": derivation}
    model = tiny_pipeline(**normalization)
    rows = WorldModelVectorEnv(
        model, 2, [Start(starts[0], states[0, 0]), Start(starts[1], states[1, 0])], autoreset_mode="Disabled", **STEPS
    )
    assert rows.single_observation_space["agent_pos"].shape == (size,)
    first = [Start(frames, state) for frames, state in zip(starts, states[:, 0], strict=False)]
    observation, _ = rows.reset(options={"frames": first})
    for action, expected in zip([None, *actions], states.swapaxes(0, 1), strict=True):
        if action is not None:
            observation, *_ = rows.step(action)
        np.testing.assert_allclose(observation["agent_pos"], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_commanded_target_is_not_reported_as_state(kind):
    """Without a proprioception model, neither recorded nor absolute actions tell the state."""
    starts = [Start(np.zeros((8, 12, 3), np.uint8), np.zeros(3))]
    model = tiny_pipeline(action_space=kind)
    assert list(WorldModelEnv(model, starts).observation_space) == ["pixels"]
    model = tiny_pipeline(action_derivation="absolute")
    assert list(WorldModelEnv(model, starts).observation_space) == ["pixels"]


def test_proprioception_reads_the_state_from_the_frames(model, starts):
    head = tiny_proprioception()
    rows = WorldModelVectorEnv(model, 2, starts, proprioception=head, **STEPS)
    observations = [rows.reset(seed=0)[0], rows.step(np.repeat(ACTION, 2, 0))[0]]
    for observation in observations:
        assert observation in rows.observation_space
        frames = torch.from_numpy(observation["pixels"]).permute(0, 3, 1, 2) / 255
        expected = head.read(frames).numpy()
        np.testing.assert_allclose(observation["agent_pos"], expected, atol=5e-2)
    limited = WorldModelEnv(model, starts, proprioception=tiny_proprioception(3.0, 4.0), **STEPS)
    assert limited.reset(seed=0)[0]["agent_pos"] in limited.observation_space["agent_pos"]


def test_proprioception_model_round_trip(tmp_path):
    head = tiny_proprioception()
    head.save_pretrained(tmp_path)
    loaded = ProprioceptionModel.from_pretrained(tmp_path)
    frames = torch.rand(3, 3, 10, 14)
    torch.testing.assert_close(loaded(frames), head(frames))
    assert loaded(frames).shape == (3, 2)
    with pytest.raises(ValueError, match="`state_low` must have 1 entries"):
        ProprioceptionModel(["x"], [0.0, 1.0], [1.0], [0.0], [1.0])


def test_damaged_files_of_a_model_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    for size in ((13, 8), (12, 9)):
        PIL.Image.new("RGB", size).save(tmp_path / "starts.png")
        with pytest.raises(
            ValueError, match=rf"start frames '.*starts.png' .* of 12x8 pixels, got {size[0]}x{size[1]}"
        ):
            load_world_model(tmp_path, "cpu")
    bomb = zlib.compress(bytes(30_000))
    header = struct.pack(">2I5B", 12, 10**8 * 8, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", bomb), (b"IEND", b""))
    ]
    (tmp_path / "starts.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ValueError, match=r"start frames '.*starts.png' cannot be read: Image size .* exceeds limit"):
        load_world_model(tmp_path, "cpu")
    (tmp_path / "starts.png").unlink()
    ProprioceptionModel(["x"], [0.0], [1.0], [0.0], [0.0]).save_pretrained(tmp_path / "proprioception")
    with pytest.raises(
        ValueError, match=r"`state_scale` of the proprioception model must be .* not zero, got \[0.0\]"
    ):
        load_world_model(tmp_path, "cpu")


def test_set_attr_sets_the_attribute_of_all_rows(model, starts):
    rows = WorldModelVectorEnv(model, 2, starts, **STEPS)
    rows.set_attr("max_episode_steps", [7, 7])
    rows.set_attr("limits", [np.arange(2)] * 2)
    assert rows.limits.tolist() == [0, 1]
    assert rows.get_attr("max_episode_steps") == (7, 7)
    with pytest.raises(ValueError, match="`values` must be one value for all 2 rows"):
        rows.set_attr("max_episode_steps", [7, 8])


def test_rescaled_actions_map_to_the_bounds(starts):
    model = tiny_pipeline(action_low=[-2.0, None, 0.0], action_high=[2.0, 3.0, 5.0])
    env = WorldModelEnv(model, starts, rescale_actions=True, **STEPS)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (3,))
    raw = env._rows._raw_actions(np.float32([[-1, 0.5, 1]]), [0])
    np.testing.assert_allclose(raw, [[-2, 0.5 / 2.0, 5]])  # component 1 has scale 2 and offset 0
    np.testing.assert_allclose(env._rows._raw_actions(np.float32([[0, 1, 0]]), [0]), [[0, 0.5, 2.5]])


def test_clipped_actions(model, starts):
    env, other = (WorldModelEnv(model, starts, clip_actions=True, **STEPS) for _ in range(2))
    for each in (env, other):
        each.reset(seed=0)
    close(env.step([9.0, 0.0, -1.0])[0]["pixels"], other.step([2.0, 0.0, 0.0])[0]["pixels"])


def bad_step(action, **options):
    return lambda model, starts: (env := WorldModelEnv(model, starts, **STEPS | options)).reset() and env.step(action)


def bad_reset(**options):
    return lambda model, starts: WorldModelVectorEnv(model, 2, starts, **STEPS).reset(**options)


BAD = [
    (bad_step([np.nan, 0, 0]), r"`actions` must be finite, got \[nan, 0.0, 0.0\] in row 0"),
    (bad_step([0, 0]), r"`actions` must be \(1, 3\), one action per row, got \(1, 2\)"),
    (bad_step([[0, 0, 0]]), r"`actions` must be \(1, 3\)"),
    (bad_step(["a", 0, 0]), r"`actions` must be \(1, 3\), all numbers"),
    (bad_step([2.1, 0, 0]), r"`actions` must be in \[-2, 2\] for 'action 0', got 2.1 in row 0"),
    (bad_step([0, 0, -1e38]), r"`actions` must be in \[0, 5\] for 'action 2'"),
    (bad_step([0, 0, 1], reward=lambda frames: frames.mean() * float("nan")), "`reward` must return"),
    (bad_step([0, 0, 1], reward=lambda frames: brightness(frames) / 0 * 0), "`reward` must return finite values"),
    (bad_step([0, 0, 1], reward=lambda frames: frames), r"`reward` must return \(1, 1\), got \(1, 1, 3, 8, 12\)"),
    (lambda model, starts: WorldModelEnv(model, starts).step([0, 0, 1]), "`reset` must be called before `step`"),
    (lambda model, starts: WorldModelEnv(model).reset(), "`reset` requires frames to start from, got None"),
    (lambda model, starts: WorldModelEnv(model, starts[:, :, :6]).reset(), "`frames` must be 8x12 .* got 6x12"),
    (lambda model, starts: WorldModelEnv(model, starts / 255).reset(), r"`frames` must be .* uint8 .* got float64"),
    (lambda model, starts: WorldModelEnv(model, []), "`starts` must contain at least one start"),
    (lambda model, starts: WorldModelEnv(model, starts, max_episode_steps=0), "`max_episode_steps` must be at least"),
    (lambda model, starts: WorldModelEnv(model, starts, render_mode="human"), "`render_mode` must be 'rgb_array'"),
    (lambda model, starts: WorldModelEnv(model, starts).render(), "`render_mode` must be 'rgb_array' to render"),
    (lambda model, starts: WorldModelVectorEnv(model, 0, starts), "`num_envs` must be at least 1, got 0"),
    (lambda model, starts: Start(starts[0], [np.nan]), "`state` must be a finite vector"),
    (bad_reset(seed=-1), "`seed` must not be negative"),
    (bad_reset(seed=[1, 2, 3]), "`seed` must be one integer or a list of 2"),
    (bad_reset(options={"frames": np.zeros((3, 8, 12, 3), np.uint8)}), "`frames` must be 2 histories, .* got 3"),
    (bad_reset(options={"frames": np.zeros((2, 8, 9, 3), np.uint8)}), "`frames` must be 8x12 .* got 8x9"),
    (
        bad_reset(options={"frames": np.zeros((2, 3, 8, 12, 3), np.uint8)}),
        "`frames` must contain 1 to 2 history frames",
    ),
    (bad_reset(options={"reset_mask": np.zeros(2, bool)}), "`reset_mask` must be bool .* one True, got .* with 0"),
    (bad_reset(options={"reset_mask": np.ones(3, bool)}), "`reset_mask` must be bool"),
    (bad_reset(options={"reset_mask": np.ones(2)}), "`reset_mask` must be bool"),
    (
        bad_reset(options={"reset_mask": np.array([True, False])}),
        "that have not been reset yet, got a mask without row 1",
    ),
]


@pytest.mark.parametrize(("do", "message"), BAD)
def test_bad_input_raises(do, message, model, starts):
    with pytest.raises(ValueError, match=message):
        do(model, starts)


def test_error_changes_nothing(model, starts):
    env, other = (WorldModelEnv(model, starts, max_episode_steps=2, **STEPS) for _ in range(2))
    for each in (env, other):
        each.reset(seed=2)
    for bad in ([np.nan, 0, 0], [9, 0, 0], [0, 0]):
        with pytest.raises(ValueError, match="`actions`"):
            env.step(bad)
    for _ in range(2):
        result, expected = env.step(ACTION[0]), other.step(ACTION[0])
        np.testing.assert_array_equal(result[0]["pixels"], expected[0]["pixels"])
        assert result[1:] == expected[1:]


class Episodes(list):
    """A data source in memory."""

    def window(self, number, start, length):
        episode, rows = self[number], slice(start, start + length)
        states = {key: value[rows] for key, value in episode.states.items()}
        return Episode(episode.frames[rows], episode.actions[rows], states)


def test_starts_of_a_data_set():
    rng = np.random.default_rng(0)
    dataset = Episodes(
        Episode(
            rng.integers(0, 256, (6, 8, 12, 3), dtype=np.uint8),
            rng.normal(size=(6, 3)),
            {"observation.state": rng.normal(size=(6, 4))},
        )
        for _ in range(3)
    )
    starts = EpisodeStarts(dataset, num_frames=2, first_frame=3, state_key="observation.state")
    assert len(starts) == 3
    np.testing.assert_array_equal(starts[1].frames, dataset[1].frames[3:5])
    np.testing.assert_allclose(starts[1].state, dataset[1].states["observation.state"][4])
    assert EpisodeStarts(dataset)[2].state is None
    with pytest.raises(ValueError, match=r"`state_key` must be None or one of .*observation\.state"):
        EpisodeStarts(dataset, state_key="state")[0]


def test_registered_environments(tmp_path, model, starts):
    """`irasim/PushT-v0` loads the reward and the proprioception model in the folder of its pipeline."""
    env = gymnasium.make("irasim_diffusers.envs:irasim/PushT-v0", render_mode="rgb_array")
    observation, _ = env.reset(seed=1)
    observation, reward, *_ = env.step(env.action_space.sample())
    frame = torch.from_numpy(observation["pixels"]).movedim(-1, 0) / 255
    assert reward == pytest.approx(env.unwrapped._rows.reward(frame).item(), abs=0.01)
    assert env.unwrapped._rows.success.__self__ is env.unwrapped._rows.reward
    assert sorted(observation) == ["agent_pos", "pixels"]
    assert (env.render().shape, env.metadata["render_fps"]) == ((96, 96, 3), 10)
    model.save_pretrained(tmp_path)
    rows = gymnasium.make_vec("irasim/WorldModel-v0", num_envs=2, model=tmp_path, starts=starts, device="cpu", **STEPS)
    assert isinstance(rows.unwrapped, WorldModelVectorEnv)
    assert list(rows.single_observation_space) == ["pixels"]
    rows.reset(seed=0)
    rows.step(rows.action_space.sample())
    env = gymnasium.make("irasim/WorldModel-v0", model=model, starts=starts, max_episode_steps=2, **STEPS)
    env.reset(seed=0)
    assert [env.step(ACTION[0])[3] for _ in range(2)] == [False, True]


def test_gymnasium_checker_passes():
    """Raw actions are far from [-1, 1], which Gymnasium advises against; rescaled ones give no warning."""
    for rescale, expected in ((False, ["we recommend using a symmetric and normalized space"]), (True, [])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            env = gymnasium.make("irasim/PushT-v0", render_mode="rgb_array", rescale_actions=rescale)
            check_env(env.unwrapped)
        ours = [warning for warning in caught if "torchao" not in str(warning.message)]
        assert len(ours) == len(expected)
        assert all(text in str(warning.message) for text, warning in zip(expected, ours, strict=True))


def test_stable_baselines3_trains():
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    env = gymnasium.make("irasim/PushT-v0", rescale_actions=True)
    agent = stable_baselines3.PPO("MultiInputPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0)
    agent.learn(32)
    assert agent.num_timesteps == 32


def test_state_size_is_constant(model, starts):
    rows = WorldModelVectorEnv(model, 2, starts, max_episode_steps=10**6, **STEPS)
    rows.reset(seed=0)

    def size():
        tensors = [state.latents for state in rows._states]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    sizes = []
    for step in actions_of(6, 2):
        rows.step(step)
        sizes.append(size())
    assert len(set(sizes)) == 1
    assert sizes[0] == sum(state.latents.numel() * 4 for state in rows._states)


def test_any_world_model_works(starts):
    """A model that is not a pipeline: pixels as latents, and each action shifts the brightness."""

    class Shift:
        action_space = dataclasses.replace(tiny_pipeline().action_space, low=(-1.0,) * 3, high=(1.0,) * 3)
        frame_size, fps, max_chunk = (8, 12), None, 1

        def start(self, frames, seeds):
            from irasim_diffusers import RolloutState

            latents = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 255
            return RolloutState.first(latents, seeds)

        def advance(self, state, actions):
            future = (state.latents[:, :, -1:] + actions[:, :, :1, None, None].transpose(1, 2)).clamp(0, 1)
            return state.append(future, 2), future

        def decode(self, latents):
            return latents.transpose(1, 2)

    env = WorldModelEnv(Shift(), starts)
    first, _ = env.reset(seed=0)
    observation, *_ = env.step([0.2, 0, 0])
    expected = (first["pixels"] / 255 + 0.2).clip(0, 1)
    np.testing.assert_allclose(observation["pixels"] / 255, expected, atol=0.003)
    assert env.metadata["render_fps"] == 10


def test_registered_environments_can_be_described_as_json():
    for name in ("irasim/PushT-v0", "irasim/WorldModel-v0"):
        spec = gymnasium.spec(name)
        restored = gymnasium.envs.registration.EnvSpec.from_json(spec.to_json())
        assert (restored.id, restored.entry_point) == (name, spec.entry_point)


def test_call_of_a_method_without_result(model, starts):
    envs = WorldModelVectorEnv(model, 2, starts)
    envs.nothing = lambda: None
    assert envs.call("nothing") == (None, None)
