import importlib
import json
import shutil
import signal
import textwrap

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline

from irasim_diffusers import embedded_checkpoint
from irasim_diffusers.cli import main
from irasim_diffusers.commands.evaluate_policies import _files_hash
from irasim_diffusers.evaluation import policies
from irasim_diffusers.rewards import FrameRegressor

pytestmark = pytest.mark.usefixtures("offline")

LOADER = """
    import torch
    from irasim_diffusers.policies import ChunkPolicy

    def load(path, action_space):
        if path.endswith("broken"):
            raise ValueError("no such policy")
        target = float(path)
        return ChunkPolicy(lambda observation: torch.full((len(observation["pixels"]), 2), target), action_space)

    def load_last(path, action_space):
        return load(path[-1], action_space)

    def load_none(path, action_space):
        return None

    def load_wide(path, action_space):
        return ChunkPolicy(lambda observation: torch.zeros(len(observation["pixels"]), 3), action_space)

    def load_bad(path, action_space):
        return ChunkPolicy(lambda observation: observation["wrist"], action_space)

    def load_on(path, action_space, device=None):
        open("device.txt", "w").write(device)
        return load(path, action_space)
"""
SHORT = {"num-episodes": 1, "batch-size": 1, "max-episode-steps": 1, "num-videos": 0}
PUSHT = {"obs_type": "pixels_agent_pos"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policies")
    (path / "my_policies.py").write_text(textwrap.dedent(LOADER))
    FrameRegressor(channels=(4, 8), feature_dim=4).save_pretrained(path / "reward")
    tiny_pipeline(num_inference_steps=1).save_pretrained(path / "tiny")
    return path


@pytest.fixture
def command(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)

    def run(**changes):
        flags = {
            "policies": ["100", "400.5"],
            "loader": "my_policies:load",
            "env": "gym_pusht:gym_pusht/PushT-v0",
            "env-kwargs": json.dumps(PUSHT),
            "reward": "reward",
            "num-episodes": 3,
            "batch-size": 2,
            "max-episode-steps": 2,
            "device": "cpu",
            "output": tmp_path / "out",
        } | changes
        argv = []
        for name, value in flags.items():
            if value is None:
                continue
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return main(["evaluate-policies", *argv])

    return run


def test_push_t_episodes_run_in_both_environments(command, capsys, tmp_path):
    assert command() == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("100: success 0% real, ")
    assert printed[-1].endswith("report.md")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["policies"]) == ["100", "400.5"]
    assert report["num_seeds"] == 3
    assert report["setting"]["env"] == "gym_pusht:gym_pusht/PushT-v0"
    episodes = sorted(path.name for path in (tmp_path / "out" / "episodes" / "100").glob("*.json"))
    assert episodes == ["100000.json", "100001.json", "100002.json"]
    assert command() == 0  # resumes, and finds all results
    assert command(**{"success-threshold": 0.5}) == 2
    assert "success_threshold was" in capsys.readouterr().err


def test_the_default_reward_is_stored_with_the_model(command, capsys, tmp_path):
    """Its threshold defines success, unless a flag overrides it."""
    few = {"reward": None, "num-episodes": 1, "batch-size": 1, "max-episode-steps": 1, "num-videos": 0}
    for threshold, success in (({}, False), ({"success-threshold": -1}, True)):
        output = tmp_path / str(success)
        assert command(**few, **threshold, output=output) == 0
        outcome = json.loads((output / "episodes" / "100" / "100000.json").read_text())["model"]
        assert outcome["success"] == success
        assert 0 <= outcome["score"] < 0.9


def test_names_of_policies_tell_them_apart(command, tmp_path):
    assert command(policies=["a/1", "b/1"], **SHORT, loader="my_policies:load_last") == 0
    setting = json.loads((tmp_path / "out" / "setting.json").read_text())
    assert setting["policies"] == ["a-1", "b-1"]


def test_failed_command_leaves_the_folder_to_the_corrected_one(command, capsys, tmp_path):
    """All policies are loaded before the first episode."""
    assert command(policies=["100", "broken"], **SHORT) == 2
    assert capsys.readouterr().err == "irasim: error: --policies 'broken' cannot be loaded: no such policy\n"
    assert list(tmp_path.iterdir()) == []
    assert command(policies=["100", "200"], **SHORT) == 0


@pytest.mark.parametrize("num_videos", [0, 1])
def test_folder_with_other_settings_but_without_episodes_is_used(command, tmp_path, num_videos):
    """Earlier versions left a settings file if a run failed before its first episode."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "setting.json").write_text('{"policies": ["x"]}')
    assert command(**SHORT | {"num-videos": num_videos}) == 0
    assert json.loads((tmp_path / "out" / "setting.json").read_text())["policies"] == ["100", "400.5"]


def test_comparison_without_matplotlib_is_an_error_before_the_episodes(command, capsys, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(policies, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert command(**SHORT) == 2
    assert "requires matplotlib: pip install '.[evaluation]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_retrained_model_or_reward_requires_new_folder(command, capsys, tmp_path, folder):
    """The model and the reward are identified by the content of their weights, not by their names."""
    for name in ("model", "reward"):
        shutil.copytree(embedded_checkpoint(), tmp_path / name / "model")
        shutil.copytree(folder / "reward", tmp_path / name / "reward")
    names = {"model": "model/transformer", "reward": "reward"}
    for name, changed in names.items():
        root = tmp_path / name
        flags = {"model": root / "model", "reward": root / "reward", "output": root / "out"} | SHORT
        assert command(**flags) == 0
        (weights,) = (root / changed).glob("*.safetensors")
        tensors = load_file(weights)
        key = next(key for key in tensors if key.endswith("bias"))
        save_file(tensors | {key: tensors[key] + 0.5}, weights, metadata={"format": "pt"})
        assert command(**flags) == 2
        assert "contains an evaluation with other settings: weights was" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 100000}', '{"real": {}, "model": {}}'])
def test_damaged_episodes_run_again(command, tmp_path, content):
    assert command(**SHORT) == 0
    path = tmp_path / "out" / "episodes" / "100" / "100000.json"
    first = path.read_text()
    path.write_text(content)
    assert command(**SHORT) == 0
    assert path.read_text() == first


def test_policies_run_on_the_device_of_the_model(command, tmp_path, folder):
    """Loaders with the argument `device` receive it, such as the loader of LeRobot policies."""
    assert command(policies=["100"], loader="my_policies:load_on", **SHORT) == 0
    assert (folder / "device.txt").read_text() == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["100", "100"]}, "--policies must be unique"),
        ({"policies": ["broken"]}, "--policies 'broken' cannot be loaded: no such policy"),
        ({"policies": ["100", "bug"]}, "--policies 'bug' cannot be loaded: could not convert string to float"),
        ({"loader": "builtins:len"}, "--policies '100' cannot be loaded: len() takes exactly one argument"),
        ({"loader": "my_policies:load_none"}, "policy '100' must have `select_action` and `reset`, got NoneType"),
        ({"loader": "my_policies:load_wide"}, "policy '100' fails on the first observation: ValueError: the policy"),
        ({"loader": "my_policies:load_bad"}, "policy '100' fails on the first observation: KeyError: 'wrist'"),
        ({"loader": None, "policies": ["missing"]}, "--policies 'missing' cannot be loaded: "),
        ({"loader": "my_policies"}, "--loader must be MODULE:NAME of a callable, got 'my_policies'"),
        (
            {"loader": "missing:load"},
            "--loader must be MODULE:NAME of a callable, got 'missing:load': No module named",
        ),
        ({"loader": "my_policies:LOADER"}, "--loader must be MODULE:NAME of a callable, got 'my_policies:LOADER'"),
        ({"loader": "math:pi"}, "--loader must be MODULE:NAME of a callable, got 'math:pi', a value of type float"),
        ({"env": "Missing-v0"}, "--env 'Missing-v0' with"),
        ({"env": "CartPole-v1", "env-kwargs": "{}"}, "the observations of `real` must contain `pixels`"),
        ({"env-kwargs": "[1]"}, "--env-kwargs must be a JSON object, got '[1]'"),
        ({"env-kwargs": 100_000 * "["}, "--env-kwargs must be a JSON object, got '[["),
        ({"env-kwargs": '{"max_episode_steps": 3}'}, "--env-kwargs must not contain max_episode_steps"),
        ({"loader": ".x:y"}, "--loader must be MODULE:NAME of a callable, got '.x:y'"),
        ({"env-kwargs": "{"}, "--env-kwargs must be a JSON object, got '{'"),
        ({"env-kwargs": '{"wrong": 1}'}, "--env 'gym_pusht:gym_pusht/PushT-v0' with"),
        ({"model": "missing"}, "--model must be a pipeline folder or Hub id, got 'missing'"),
        ({"reward": "missing"}, "--reward must be a FrameRegressor, got 'missing'"),
        ({"reward": None, "model": "tiny"}, "--reward is required, because 'tiny' contains no reward model"),
        ({"success-threshold": "nan"}, "--success-threshold must be finite, got nan"),
        ({"num-episodes": 0}, "--num-episodes must be at least 1, got 0"),
        ({"max-episode-steps": 0}, "--max-episode-steps must be at least 1, got 0"),
        ({"batch-size": -2}, "--batch-size must be at least 1, got -2"),
        ({"batch-size": 10**8}, "--batch-size must be at most 1024, got 100000000"),
        ({"num-episodes": 10**9}, "--num-episodes must be at most 100000, got 1000000000"),
        ({"steps": 1001}, "--steps must be at most 1000, got 1001"),
        ({"first-seed": -1}, "--first-seed must be at least 0, got -1"),
        ({"first-seed": 2**70}, "--first-seed must be at most 2147483647, got 1180591620717411303424"),
        ({"num-videos": -1}, "--num-videos must be at least 0, got -1"),
        ({"env": ""}, "--env"),
        ({"env": "CartPole-v1\0"}, "--env"),
        ({"policies": ["a\0b"]}, "--policies must be a path without NUL"),
        ({"reward": "a\0b"}, "--reward"),
        ({"model": "a\0b"}, "--model"),
        ({"output": "a\0b"}, "--output must be a path without NUL"),
        ({"output": "/proc/new"}, "--output must be writable, got '/proc/new': "),
        ({"device": "abacus"}, "--device must be"),
        ({"output": "my_policies.py"}, "--output must be a folder, got the file 'my_policies.py'"),
    ],
)
def test_bad_input_ends_in_one_line(command, capsys, tmp_path, changes, message):
    assert command(**changes) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"irasim: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_signals_keep_finished_episodes(command, capsys, tmp_path, monkeypatch):
    from irasim_diffusers.evaluation import policies

    write, written = policies.write_video, []

    def interrupt(*arguments):
        write(*arguments)
        written.append(arguments[0])
        if len(written) == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(policies, "write_video", interrupt)
        assert command() == 143
    assert capsys.readouterr().err.splitlines()[-1] == "irasim: terminated"
    assert not list(tmp_path.rglob("*.partial*"))
    assert [path.name for path in tmp_path.rglob("1*.json")] == ["100000.json"]
    assert command() == 0
    assert len(list(tmp_path.rglob("1*.json"))) == 6


def test_hash_of_a_policy_follows_its_files(tmp_path):
    assert _files_hash(tmp_path / "absent") is None
    (tmp_path / "model.safetensors").write_bytes(b"first")
    first = _files_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert _files_hash(tmp_path) != first
    (tmp_path / "model.safetensors").write_bytes(b"first")
    assert _files_hash(tmp_path) == first
