"""The environments in LeRobot: the calls of its rollouts, and `lerobot-eval` if it is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import irasim_diffusers
from irasim_diffusers.lerobot.env import LeRobotVectorEnv

TASK = {"task": "push the block"}


def first_row_succeeds_once():
    """Return a success function that is true for the first row at the second step."""
    calls = iter([False, False, True])  # called at the reset and in two steps
    return lambda frames: torch.tensor([[row == 0 and next(calls, False)] for row in range(len(frames))])


def test_rollout_with_the_calls_of_lerobot():
    """Like `lerobot_eval.rollout` of LeRobot 0.6.1, step all rows until the last one has ended."""
    env = LeRobotVectorEnv.from_pretrained(
        str(irasim_diffusers.embedded_checkpoint()),
        num_envs=2,
        success=first_row_succeeds_once(),
        reward=lambda frames: torch.ones(frames.shape[:2]),
        max_episode_steps=3,
        **TASK,
    )
    observation, _ = env.reset(seed=[1000, 1001], options={"lerobot_new_rollout": True})
    assert env.call("_max_episode_steps")[0] == 3
    assert env.get_attr("task_description") == env.get_attr("task") == ("push the block",) * 2
    assert env.unwrapped.metadata["render_fps"] == 10
    assert type(env.unwrapped.metadata["render_fps"]) is int
    done, rewards, successes = np.zeros(2, bool), [], []
    for _ in range(3):
        assert observation["pixels"].shape == (2, 96, 96, 3)
        assert observation["pixels"].dtype == np.uint8
        assert observation["agent_pos"].dtype == np.float32
        np.testing.assert_array_equal(observation["agent_pos"], observation["observation.state"])
        assert [picture.shape for picture in env.call("render")] == [(96, 96, 3)] * 2
        actions = np.float32([[600, 256], [100, 100]])  # the first is slightly out of bounds, which policies can cause
        observation, reward, terminated, truncated, info = env.step(actions)
        assert "final_info" not in info
        rewards.append(reward)
        successes.append(info["is_success"])
        done |= terminated | truncated
    assert done.all()
    assert truncated.tolist() == [False, True]
    np.testing.assert_array_equal(rewards, [[1, 1], [1, 1], [0, 1]])  # a finished row gets no reward
    np.testing.assert_array_equal(np.any(successes, axis=0), [True, False])
    env.close()
    env.close()


def test_env_hub_form(tmp_path):
    """LeRobot imports a copy of `env.py` outside the package by its path."""
    path = tmp_path / "env.py"
    path.write_text((Path(irasim_diffusers.__file__).parent / "lerobot" / "env.py").read_text())
    spec = importlib.util.spec_from_file_location("hub_env", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ((suite, environments),) = module.make_env(n_envs=2, use_async_envs=True).items()
    assert (suite, list(environments), environments[0].num_envs) == ("irasim", [0], 2)
    assert list(environments[0].reset(seed=1)[0]) == ["pixels", "agent_pos", "observation.state"]


def test_missing_lerobot_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "lerobot", None)
    for name in [name for name in sys.modules if name.startswith("lerobot.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "irasim_diffusers.lerobot.config", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lerobot\[evaluation\]>=0.6'"):
        importlib.import_module("irasim_diffusers.lerobot.config")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """An untrained ACT policy of LeRobot."""
    pytest.importorskip("lerobot")
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    from irasim_diffusers.lerobot.config import IRASimEnvConfig

    folder = tmp_path_factory.mktemp("policy")
    environment = IRASimEnvConfig(device="cpu")
    environment.create_envs(1)
    assert {key: feature.shape for key, feature in environment.features.items()} == {
        "observation.image": (96, 96, 3),
        "observation.state": (2,),
        "action": (2,),
    }
    config = ACTConfig(
        chunk_size=4, n_action_steps=2, dim_model=32, n_heads=2, dim_feedforward=32, n_encoder_layers=1, device="cpu"
    )
    config.pretrained_backbone_weights, config.push_to_hub, config.use_vae = None, False, False
    torch.manual_seed(0)
    network = make_policy(config, env_cfg=environment)
    stats = {
        key: {"mean": torch.full(shape, 256.0 if len(shape) == 1 else 0.5), "std": torch.full(shape, 0.2)}
        for key, shape in (("observation.image", (3, 1, 1)), ("observation.state", (2,)), ("action", (2,)))
    }
    network.save_pretrained(folder)
    for processor in make_pre_post_processors(network.config, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder


def evaluate(policy, output, *flags):
    command = [
        *(sys.executable, "-m", "lerobot.scripts.lerobot_eval", f"--policy.path={policy}", "--policy.device=cpu"),
        *("--env.discover_packages_path=irasim_diffusers.lerobot", "--env.type=irasim", "--env.episode_length=4"),
        *("--eval.n_episodes=2", "--eval.batch_size=2", f"--output_dir={output}", *flags),
    ]
    (output / "one.py").write_text("import torch\n\n\ndef reward(frames):\n    return torch.ones(frames.shape[:2])\n")
    path = os.pathsep.join([str(output), *(entry for entry in sys.path if entry)])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr


def test_lerobot_eval(policy, tmp_path):
    output = evaluate(policy, tmp_path, "--env.reward=one:reward", "--env.device=cpu")
    overall = json.loads((tmp_path / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2
    assert overall["avg_sum_reward"] == 4.0
    assert overall["pc_success"] == 0.0
    assert len(list(tmp_path.rglob("*.mp4"))) == 2
    assert "does not have 'task_description'" not in output


def test_recorded_rollouts_are_data_sets(policy, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from irasim_diffusers.data import open_dataset

    evaluate(policy, tmp_path, "--eval.recording=true", "--env.task=push")
    folders = sorted(path.parents[1] for path in tmp_path.rglob("meta/info.json"))
    assert len(folders) == 2
    for folder in folders:
        dataset = LeRobotDataset("eval_recording", root=folder)
        assert (dataset.num_episodes, len(dataset)) == (1, 4)
        assert dataset[0]["task"] == "push"
        episode = open_dataset(str(folder))[0]
        assert episode.frames.shape == (4, 96, 96, 3)
        np.testing.assert_allclose(episode.states["observation.state"][0], dataset[0]["observation.state"])


def test_lerobot_policy_is_loaded(policy):
    from irasim_diffusers.policies import LeRobotPolicy

    space = irasim_diffusers.IRASimPipeline.from_pretrained(irasim_diffusers.embedded_checkpoint()).action_space
    loaded = LeRobotPolicy.from_pretrained(str(policy), space)
    observation = {"pixels": np.zeros((2, 96, 96, 3), np.uint8), "agent_pos": np.full((2, 2), 256.0, np.float32)}
    loaded.reset()
    assert loaded.select_action(observation).shape == (2, 2)
    with pytest.raises(ValueError, match="'nowhere' must be the folder or Hub id of a policy"):
        LeRobotPolicy.from_pretrained("nowhere", space)
