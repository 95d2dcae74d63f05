"""Run the code blocks of closed_loop.md with smaller numbers, on two models, and that of convert.md."""

import re
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import PIL.Image
import pytest
from tiny_models import tiny_pipeline

import irasim_diffusers
import irasim_diffusers.envs  # registers the environments
from irasim_diffusers import IRASimPipeline
from irasim_diffusers.data import write_video

TEXT = (Path(__file__).parents[2] / "examples" / "closed_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", TEXT, flags=re.DOTALL)
SMALLER = {  # numbers of the guide and their replacements
    "max_episode_steps=20": "max_episode_steps=2",
    "range(20)": "range(2)",
    "num_envs=8": "num_envs=2",
    "n_steps=250, batch_size=50": "n_steps=4, batch_size=4, n_epochs=1",
    "learn(1000)": "learn(4)",
    "num_candidates=16, num_iterations=2": "num_candidates=4, num_iterations=1",
    "num_candidates=8": "num_candidates=3",
    "horizon, radius = 8": "horizon, radius = 4",
}


def run(code, capsys):
    for number, smaller in SMALLER.items():
        code = code.replace(number, smaller)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """A model of a robot with a gripper: relative poses without bounds, an autoencoder, and a stored clip."""
    folder = tmp_path_factory.mktemp("robot")
    arm = {"action_dim": 7, "action_scale": [20.0] * 6 + [1.0], "action_offset": 0.0, "num_history_frames": 1}
    arm |= {"fps": 3.0, "sample_height": 20, "sample_width": 22}  # PPO's encoder needs 36 pixels
    tiny_pipeline(num_inference_steps=1, **arm, action_derivation="relative_euler").save_pretrained(folder)
    frames = np.random.default_rng(0).integers(0, 256, (24, 40, 44, 3), dtype=np.uint8)
    write_video(folder / "example.mp4", frames, 3, lossless=True)
    PIL.Image.fromarray(np.concatenate(frames[:3])).save(folder / "starts.png")
    np.savetxt(folder / "example_actions.csv", np.full((3, 7), 0.01), delimiter=",", header="a")
    return folder


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_on_the_embedded_model(index, capsys):
    code, expected = BLOCKS[index]
    found = run(code, capsys)
    assert not expected or found.endswith(expected)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_on_another_model(index, robot, capsys, monkeypatch):
    monkeypatch.setattr(irasim_diffusers, "embedded_checkpoint", lambda: robot)
    monkeypatch.setitem(gymnasium.registry["irasim/PushT-v0"].kwargs, "model", str(robot))
    loaded, load = [], IRASimPipeline.from_pretrained

    def from_pretrained(folder, **options):
        loaded.append(Path(folder))
        return load(folder, **options)

    monkeypatch.setattr(IRASimPipeline, "from_pretrained", from_pretrained)
    code, expected = BLOCKS[index]
    found = run(code, capsys)
    assert loaded == [robot]
    assert not expected or found.endswith(expected.replace("(96, 96, 3), 'agent_pos': (2,)", "(40, 44, 3)"))


def test_a_converted_checkpoint_is_prepared_for_the_guide(robot, tmp_path, monkeypatch):
    """The block of convert.md stores the files that the blocks of the guide read."""
    text = (Path(__file__).parents[2] / "examples" / "convert.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    model = tmp_path / "irasim-rt1"
    shutil.copytree(robot, model, ignore=shutil.ignore_patterns("example*", "starts.png"))
    shutil.copy(robot / "example.mp4", tmp_path / "my_robot.mp4")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"num_inference_steps": 10', '"num_inference_steps": 1'), {})
    assert {path.name for path in model.iterdir()} >= {"starts.png", "example.mp4", "example_actions.csv"}
    env = gymnasium.make("irasim_diffusers.envs:irasim/WorldModel-v0", model=str(model))
    assert len(env.unwrapped._rows.starts) == 3
    assert env.unwrapped._rows.model.config.num_inference_steps == 1
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[0]["pixels"].shape == (40, 44, 3)


def test_numbers_of_the_guide_are_those_replaced():
    assert all(number in "".join(code for code, _ in BLOCKS) for number in SMALLER)
    assert len(TEXT.splitlines()) <= 150
