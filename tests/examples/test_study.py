"""The Push-T study in a tiny setting: real simulator, embedded model, briefly trained networks."""

import dataclasses
import json
import sys

import collect
import numpy as np
import pytest
import study
import study_episodes
import study_jobs
import study_models
import torch
import train_policy
import train_reward
from simulator import Simulator, push_about
from simulator_model import SimulatorModel

from irasim_diffusers import embedded_checkpoint

TINY = study.Size(
    num_rollouts=(0, 2),
    rollout_length=8,
    max_demonstrations=1,
    world_model_steps=0,
    evaluation_seeds=2,
    evaluation_steps=3,
    candidates=(1, 2),
    planning_seeds=1,
    planning_steps=2,
    horizon=2,
    image_seeds=1,
    image_candidates=2,
    reaching_tasks=1,
    reaching_ahead=2,
    reaching_budget=2,
    reaching_candidates=2,
    reaching_iterations=1,
    implausible_seeds=1,
    implausible_steps=2,
)


def run(script, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A dataset, two stages of a policy and two reward networks."""
    root = tmp_path_factory.mktemp("study")
    shares = ["--aimless", 0.5, "--expert", 0.5, "--noisy", 0, "--keys", 0, "--jumps", 0]
    flags = ["--episodes", 3, "--length", 32, "--first_seed", 3, "--num_workers", 1]
    run(collect, "--output", root / "data", *flags, *shares)
    flags = ["--output_dir", root / "policies", "--stages", 1, 2, "--num_episodes", 1, "--max_episode_steps", 2]
    run(train_policy, "--datasets", root / "data", *flags, "--batch_size", 4, "--encoder_steps", 1)
    for target in ("iou", "closeness"):
        flags = ["--output_dir", root / "rewards" / target, "--target", target, "--max_train_steps", 2]
        flags += ["--num_clips", 2, "--num_predicted_frames", 2, "--frames_per_episode", 4, "--batch_size", 4]
        run(train_reward, "--dataset", root / "data", "--test_dataset", root / "data", *flags)
    return root


def test_dataset_of_another_program_raises(tmp_path):
    with pytest.raises(ValueError, match="it has no settings file"):
        collect.read_settings(tmp_path)
    (tmp_path / collect.SOURCE_FILE).write_text('{"fps": 10}')
    with pytest.raises(ValueError, match=r"another program wrote '\.irasim-source\.json'"):
        collect.read_settings(tmp_path)


def arguments(inputs, output, **changes):
    values = {
        "datasets": [inputs / "data"],
        "test_dataset": inputs / "data",
        "output_dir": output,
        "policies": inputs / "policies",
        "rewards": inputs / "rewards",
        "num_workers": 1,
    }
    return study.StudyArguments(**(values | changes))


def test_study_resumes_with_the_same_results(inputs, tmp_path, monkeypatch):
    given = arguments(inputs, tmp_path)
    original, calls = study_episodes.plan_episode, []

    def interrupted(**job):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(**job)

    monkeypatch.setattr(study_episodes, "plan_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run_study(given, TINY)
    assert (tmp_path / "evaluation" / "result.json").is_file()
    assert not (tmp_path / "planning" / "result.json").is_file()
    study.run_study(given, TINY)  # the two finished jobs are not repeated
    report = json.loads((tmp_path / "report.json").read_text())
    cells = json.loads((tmp_path / "planning" / "result.json").read_text())["results"]
    assert len(calls) == 1 + len(cells)
    assert set(report) == set(study.STAGES) - {"world_models"}
    text = (tmp_path / "report.md").read_text()
    for name in ("P0-K2", "P2-K2", "simulator-K2", "optimised", "guarded", "random", "evaluation.png", "planning.png"):
        assert name in text
    for name in ("evaluation.png", "planning.png", "planning_strip.png", "planning/videos/simulator-K2.mp4"):
        assert (tmp_path / name).stat().st_size > 1000
    again = study_episodes.plan_episode(**calls[0])
    assert again | {"seconds": 0} == cells["policy"][0] | {"seconds": 0}

    number = len(calls)
    study.run_study(given, TINY)
    assert len(calls) == number
    changed = dataclasses.replace(TINY, planning_steps=1)
    with pytest.raises(ValueError, match=r"'planning'.*`planning_steps` was 2 and is 1.*--redo planning"):
        study.run_study(given, changed)
    changes = {"redo": ["planning"], "stages": ["planning"], "planning_seeds": 2, "candidates": [3, 1]}
    study.run_study(dataclasses.replace(given, **changes), changed)
    assert len(calls) == number + 2 * len(cells)
    cells = json.loads((tmp_path / "planning" / "result.json").read_text())["results"]
    assert "P0-K3" in cells
    assert {len(results) for results in cells.values()} == {2}


def test_simulator_model_is_exact():
    simulator, rng = Simulator(), np.random.default_rng(0)
    state = simulator.reset(3)
    pusher = push_about(rng, state)
    action = next(pusher)
    for _ in range(40):  # until the block moves
        state = simulator.step(action)
        action = pusher.send(state)
    model = SimulatorModel(simulator, study_models.load_model(*[str(embedded_checkpoint())] * 2)["model"].action_space)
    start = model.start(None, [0, 1])
    actions, frames = [], []
    for _ in range(12):
        actions.append(action)
        state = simulator.step(action)
        frames.append(simulator.frame())
        action = pusher.send(state)
    after, latents = model.advance(start, torch.tensor(np.stack(actions))[None].repeat(2, 1, 1))
    assert np.abs(after.latents[1, :, 0, 0, 0].numpy() - simulator.physics()).max() < 1e-6
    differing = np.abs(model.decode(latents)[1].movedim(1, -1).numpy() * 255 - np.stack(frames)).max(-1) > 1
    assert differing.mean() < 1e-3


def test_random_pipeline_has_the_same_architecture(tmp_path):
    base = embedded_checkpoint()
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        study_models.write_random_pipeline(tmp_path / name, base, seed)
    first, again, other, trained = (
        study_models.IRASimPipeline.from_pretrained(root).transformer
        for root in (tmp_path / "first", tmp_path / "again", tmp_path / "other", base)
    )
    assert {name: value.shape for name, value in first.state_dict().items()} == {
        name: value.shape for name, value in trained.state_dict().items()
    }
    weights = [model.transformer_blocks[0].attn1.to_q.weight for model in (first, again, other, trained)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_episode_figures():
    figures = study_episodes.episode_figures(np.array([0.2, 0.5, 0.4]))
    assert figures == {"score": 0.5 / 0.95, "iou": 0.5 / 1.5, "iou_stopped": 0.5 / 1.5, "success": 0.0}
    figures = study_episodes.episode_figures(np.array([0.2, 0.96, 0.99]))
    assert figures["score"] == figures["success"] == 1
    assert figures["iou_stopped"] == 0.96 / 1.04 < figures["iou"] == 0.99 / 1.01


def test_true_frames_of_implausible_targets_are_plausible():
    found = study_episodes.push_implausibly(
        model="simulator", base=str(embedded_checkpoint()), kind="wall", steps=12, seed=0
    )
    assert found["simulator"]["found"] > 0.9
    assert found["simulator"]["outside"] == found["simulator"]["inside"] == 0
    frames = np.ones((2, 96, 96, 3))
    assert study_episodes.violations(frames) == {"found": 0, "outside": 0, "inside": 0}


def test_short_or_missing_episodes_raise(inputs, tmp_path):
    with pytest.raises(ValueError, match="must have at least 42 frames, got 32 in episode 0: collect longer episodes"):
        study_episodes.reaching_tasks(inputs / "data", ["aimless", "expert"], 2, ahead=40)
    shares = ["--aimless", 1, "--expert", 0, "--noisy", 0, "--keys", 0, "--jumps", 0]
    flags = ["--episodes", 1, "--length", 2, "--first_seed", 3, "--num_workers", 1]
    run(collect, "--output", tmp_path / "aimless", *flags, *shares)
    with pytest.raises(ValueError, match="must have episodes of the expert, got none: collect some with"):
        study_models.expert_episodes(tmp_path / "aimless")


def test_goal_tolerances():
    state = study_episodes.State(np.array([100.0, 100.0]), np.array([200.0, 200.0, 0.1]))
    near = study_episodes.State(np.array([110.0, 100.0]), np.array([200.0, 210.0, 0.1 + 2 * np.pi]))
    far = study_episodes.State(np.array([115.0, 100.0]), np.array([200.0, 215.0, 0.1]))
    turned = study_episodes.State(np.array([100.0, 100.0]), np.array([200.0, 200.0, 0.1 + np.pi / 8]))
    assert study_episodes.at_goal(near, state)
    assert not study_episodes.at_goal(far, state)
    assert not study_episodes.at_goal(turned, state)


def test_jobs_in_several_processes_give_the_same_results(tmp_path):
    jobs = {"first": {"folder": tmp_path}, "second": {"folder": tmp_path}}
    found = [study_jobs.run_jobs(tmp_path / str(number), study_jobs.fingerprint, jobs, number) for number in (1, 2)]
    assert found[0] == found[1]


BAD = [
    ({"stages": ["plan"]}, "`stages` must be among policies, .*, got plan"),
    ({"redo": ["x", "y"]}, "`redo` must be among policies, .*, got x, y"),
    ({"num_workers": 0}, "`num_workers` must be at least 1, got 0"),
    ({"planning_seeds": 0}, "`planning_seeds` must be at least 1, got 0"),
    ({"evaluation_seeds": -1}, "`evaluation_seeds` must be at least 1, got -1"),
    ({"candidates": [1, 0]}, "`candidates` must be at least 1, got 0"),
    ({"candidates": [1]}, "`candidates` must contain a number above 1, got only 1"),
    ({"test_dataset": study.SCRIPTS}, "must be a complete LeRobotDataset folder"),
    ({"policies": study.SCRIPTS}, "`policies` must be a folder written by train_policy.py"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused_before_any_work(inputs, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        study.run_study(arguments(inputs, tmp_path / "out", **change), TINY)
    assert not (tmp_path / "out").exists()
