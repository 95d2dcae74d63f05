import json
import signal
import textwrap

import pytest
from conftest import tiny_pipeline

from irasim_diffusers.cli import main
from irasim_diffusers.commands.evaluate_policies import _files_hash
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
"""
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
    assert command() == 0  # resumes: everything is there
    assert command(**{"success-threshold": 0.5}) == 2
    assert "success_threshold differ" in capsys.readouterr().err


def test_the_default_reward_is_stored_with_the_model(command, capsys, tmp_path):
    """Its threshold defines success unless a flag gives another one."""
    few = {"reward": None, "num-episodes": 1, "batch-size": 1, "max-episode-steps": 1, "num-videos": 0}
    for threshold, success in (({}, False), ({"success-threshold": -1}, True)):
        output = tmp_path / str(success)
        assert command(**few, **threshold, output=output) == 0
        outcome = json.loads((output / "episodes" / "100" / "100000.json").read_text())["model"]
        assert outcome["success"] == success
        assert 0 <= outcome["score"] < 0.9


def test_names_of_policies_tell_them_apart(command, tmp_path):
    assert command(policies=["1/broken", "2/broken"]) == 2  # the names are found before a policy is loaded
    setting = json.loads((tmp_path / "out" / "setting.json").read_text())
    assert setting["policies"] == ["1-broken", "2-broken"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["100", "100"]}, "--policies must be different"),
        ({"policies": ["broken"]}, "no such policy"),
        ({"loader": "my_policies"}, "--loader must be MODULE:FUNCTION, got 'my_policies'"),
        ({"loader": "missing:load"}, "--loader must be MODULE:FUNCTION, got 'missing:load': No module named"),
        ({"loader": "my_policies:LOADER"}, "--loader must be MODULE:FUNCTION, got 'my_policies:LOADER'"),
        ({"loader": "math:pi"}, "--loader must be a function, got 'math:pi', which is float"),
        ({"env": "Missing-v0"}, "--env 'Missing-v0' with"),
        ({"env": "CartPole-v1", "env-kwargs": "{}"}, "the observations of `model` must contain those of `real`"),
        ({"env-kwargs": "[1]"}, "--env-kwargs must be a JSON object, got '[1]'"),
        ({"env-kwargs": "{"}, "--env-kwargs must be a JSON object, got '{'"),
        ({"env-kwargs": '{"wrong": 1}'}, "--env 'gym_pusht:gym_pusht/PushT-v0' with"),
        ({"model": "missing"}, "--model must be a pipeline folder or Hub id, got 'missing'"),
        ({"reward": "missing"}, "--reward must be a FrameRegressor, got 'missing'"),
        ({"reward": None, "model": "tiny"}, "--reward is required: no reward is stored with the model 'tiny'"),
        ({"success-threshold": "nan"}, "--success-threshold must be finite, got nan"),
        ({"num-episodes": 0}, "--num-episodes must be at least 1, got 0"),
        ({"max-episode-steps": 0}, "--max-episode-steps must be at least 1, got 0"),
        ({"batch-size": -2}, "--batch-size must be at least 1, got -2"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"first-seed": -1}, "--first-seed must not be negative, got -1"),
        ({"num-videos": -1}, "--num-videos must not be negative, got -1"),
        ({"env": ""}, "--env"),
        ({"env": "CartPole-v1\0"}, "--env"),
        ({"policies": ["a\0b"]}, "a"),
        ({"reward": "a\0b"}, "--reward"),
        ({"model": "a\0b"}, "--model"),
        ({"output": "a\0b"}, "--output must be a path without NUL"),
        ({"output": "/proc/new"}, "--output must be writable"),
        ({"device": "abacus"}, "--device must be"),
        ({"output": "my_policies.py"}, "--output must be a folder, got the file 'my_policies.py'"),
    ],
)
def test_bad_input_ends_in_one_line(command, capsys, tmp_path, changes, message):
    assert command(**changes) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("irasim: error: ")
    assert message in error
    assert not list(tmp_path.rglob("report.*"))


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
    assert _files_hash(str(tmp_path / "absent")) is None
    (tmp_path / "model.safetensors").write_bytes(b"first")
    first = _files_hash(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert _files_hash(str(tmp_path)) != first
    (tmp_path / "model.safetensors").write_bytes(b"first")
    assert _files_hash(str(tmp_path)) == first
