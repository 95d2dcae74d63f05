"""Policy evaluation: the same episodes in a world model and in the real environment.

The protocol follows section 4.2 of the paper.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data import write_video
from ..files import temporary_path, write_text
from ..json_files import read_json_object
from ..metrics import agreement, bootstrap
from ..policies import Policy
from ..starts import Start
from ..version import INSTALL
from .results import check_result_folder, has_types, read_result

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from ..envs import WorldModelVectorEnv

ENVIRONMENTS = ("real", "model")
EPISODES = "episodes"
"""Folder of the episodes in the output folder."""


@dataclass(frozen=True)
class PolicyEvaluation:
    """Arguments of a policy evaluation.

    Args:
        policies: Policies by name. A value may also be a function without arguments that loads the policy lazily. Each policy
            with missing episodes is loaded and called once before the first episode.
        real: The real environment: a Gymnasium vector environment (autoreset mode not `SameStep`) with observations
            `pixels` (B, H, W, 3), uint8, and usually `agent_pos`. Without `is_success` in `info`, termination counts as success.
        model: The environment of the world model (autoreset mode `Disabled`, or `NextStep` with `starts`), with as many rows as
            `real` and at least `max_episode_steps` steps. An episode starts from the first real frame and state of the same seed.
        output: Folder of the report and of the episodes.
        seeds: Seeds of the episodes, held out from the training data.
        max_episode_steps: Steps after which an episode ends in both environments.
        num_videos: Number of side-by-side videos per policy that the report links, disagreements first. All episodes are
            recorded, because the outcomes are not known in advance; 0 records none.
        setting: Further JSON-serializable entries of the report. An output folder with other settings is not accepted.
    """

    policies: Mapping[str, Policy | Callable[[], Policy]]
    real: VectorEnv
    model: WorldModelVectorEnv
    output: Path
    seeds: Sequence[int]
    max_episode_steps: int = 300
    num_videos: int = 2
    setting: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Episodes:
    """Outcomes of B episodes.

    Args:
        success: Whether an episode ended successfully (B,), bool.
        score: Largest reward of an episode (B,).
        length: Number of steps of an episode (B,).
        frames: Observed frames (length + 1, H, W, 3), uint8, of each episode; empty if they were not recorded.
    """

    success: np.ndarray
    score: np.ndarray
    length: np.ndarray
    frames: list[np.ndarray]


def evaluate_policies(evaluation: PolicyEvaluation) -> dict[str, Any]:
    """Run every policy in both environments from the same starts, and report how well the outcomes agree.

    Under `accelerate launch`, the processes share the episodes. Running the same command again resumes the evaluation.

    Returns:
        The report, as in `report.json`; empty in all processes but the main one.

    Raises:
        ValueError: If an argument is invalid, a package is missing, a policy or episode fails, or `output` has other content.
    """
    state, output = PartialState(), Path(evaluation.output)
    _check(evaluation)
    check_result_folder(output, _setting(evaluation), EPISODES)
    size = evaluation.real.num_envs
    batches = [evaluation.seeds[first : first + size] for first in range(0, len(evaluation.seeds), size)]
    jobs = [(name, batch) for name in evaluation.policies for batch in batches]
    missing = [
        (name, batch) for name, batch in jobs if any(not _is_finished(evaluation, name, seed) for seed in batch)
    ]
    policies = _LoadedPolicies(evaluation.policies)
    for name in dict(missing):
        _check_policy(evaluation, name, policies)
    state.wait_for_everyone()  # all processes have found the same missing episodes
    own = missing[state.process_index :: state.num_processes]
    with tqdm(own, desc="policies", unit="batch", disable=not state.is_main_process) as bar:
        for name, batch in bar:
            _run_batch(evaluation, name, policies[name], batch)
    state.wait_for_everyone()
    report: dict[str, Any] = {}
    if state.is_main_process:
        report = summarise_policies(
            {
                name: [read_json_object(_path(output, name, seed), finite=True) for seed in evaluation.seeds]
                for name in evaluation.policies
            }
        )
        report["setting"] = _setting(evaluation)
        _write_report(report, evaluation)
    state.wait_for_everyone()
    return report


def run_episodes(
    environment: VectorEnv,
    policy: Policy,
    seeds: Sequence[int],
    max_episode_steps: int = 300,
    starts: Sequence[Start] | None = None,
    record: bool = False,
) -> Episodes:
    """Run one episode of a policy in each row of an environment.

    Args:
        environment: Gymnasium vector environment with B rows, like `real` or `model` of `PolicyEvaluation`.
        policy: The policy. Random numbers that it draws from torch or NumPy depend only on the first seed.
        seeds: Seeds of the episodes (B,).
        max_episode_steps: Steps after which an episode ends.
        starts: Starts of the rows, for environments of a world model. None if the seeds determine them.
        record: Keep the frames of the episodes in memory.

    Returns:
        The outcomes of the episodes.

    Raises:
        ValueError: If there are not as many seeds as rows, the policy fails, an action is invalid, or a reward is not finite.
    """
    rows = environment.num_envs
    if len(seeds) != rows:
        raise ValueError(f"`seeds` must be {rows} integers, one per row of the environment, got {len(seeds)}.")
    torch.manual_seed(seeds[0])
    np.random.seed(seeds[0] % 2**32)  # noqa: NPY002 - policies may use the global generator
    policy.reset()
    options = None if starts is None else {"frames": list(starts)}
    observation, _ = environment.reset(seed=list(seeds), options=options)  # type: ignore[arg-type]
    running = np.ones(rows, bool)
    success, length = np.zeros(rows, bool), np.zeros(rows, np.int64)
    score = np.full(rows, -np.inf)
    frames = [[frame] for frame in observation["pixels"].copy()]
    for step in range(max_episode_steps):
        try:
            actions = np.asarray(policy.select_action(observation), dtype=np.float32)
        except Exception as error:  # policies raise errors of any type
            raise ValueError(f"the policy fails at step {step}: {type(error).__name__}: {error}") from error
        _check_actions(actions, environment, step)
        invalid = np.nonzero(~np.isfinite(actions).reshape(rows, -1).all(1) & running)[0]
        if len(invalid):
            raise ValueError(f"the policy must return finite actions, got {actions[invalid[0]]} at step {step}.")
        observation, reward, terminated, truncated, info = environment.step(actions)
        invalid = np.nonzero(~np.isfinite(reward) & running)[0]
        if len(invalid):
            raise ValueError(f"the environment must return finite rewards, got {reward[invalid[0]]} at step {step}.")
        ended = terminated | truncated
        score[running] = np.maximum(score, reward)[running]
        success[running] = _successes(info, terminated)[running]
        length[running] += 1
        if record:
            for row in np.nonzero(running)[0]:
                frames[row].append(observation["pixels"][row].copy())
        running &= ~ended
        if not running.any():
            break
    return Episodes(success, score, length, [np.stack(each) for each in frames] if record else [])


def summarise_policies(episodes: Mapping[str, Sequence[Mapping[str, Any]]], seed: int = 0) -> dict[str, Any]:
    """Compute success rates and scores of each policy, and the agreement of the two environments.

    Args:
        episodes: Outcomes of each policy, for the same seeds in the same order. An outcome contains `seed`, and under each of
            `real` and `model` the entries `success`, `score` and `length`.
        seed: Seed of the bootstrap.

    Returns:
        `policies`, `agreement` if there are at least two policies, and `num_seeds`.
    """
    rng = np.random.default_rng(seed)
    policies: dict[str, Any] = {}
    for name, found in episodes.items():
        outcomes = {place: np.array([each[place]["success"] for each in found], float) for place in ENVIRONMENTS}
        real, model = outcomes["real"], outcomes["model"]
        entry: dict[str, Any] = {
            place: {
                "success": bootstrap(outcomes[place], rng),
                "score": bootstrap(np.array([each[place]["score"] for each in found]), rng),
            }
            for place in ENVIRONMENTS
        }
        entry["same_outcome"] = bootstrap((real == model).astype(float), rng)
        entry["success_in_model_only"] = int(((model == 1) & (real == 0)).sum())
        entry["success_in_reality_only"] = int(((model == 0) & (real == 1)).sum())
        policies[name] = entry
    report: dict[str, Any] = {"policies": policies, "num_seeds": len(next(iter(episodes.values())))}
    if len(policies) >= 2:
        report["agreement"] = {}
        for figure in ("success", "score"):
            real, model = (
                np.array([[each[place][figure] for each in found] for found in episodes.values()], float)
                for place in ENVIRONMENTS
            )
            report["agreement"][figure] = agreement(real, model, rng)
    return report


def _check(evaluation: PolicyEvaluation) -> None:
    if not evaluation.policies:
        raise ValueError("`policies` must contain at least one policy, got none.")
    if len(evaluation.policies) >= 2 and find_spec("matplotlib") is None:
        raise ValueError(f"the comparison of policies requires matplotlib: {INSTALL.format('evaluation')}.")
    for name in evaluation.policies:
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise ValueError(
                f"the name of a policy must consist of letters, digits, '_', '.' and '-', not only of '.' and '-', got {name!r}."
            )
    seeds = list(evaluation.seeds)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        wrong = [seed for seed in seeds if seed < 0 or seeds.count(seed) > 1][:8]
        raise ValueError(f"`seeds` must be one or more distinct non-negative integers, got {wrong or 'none'}.")
    for name, least in (("max_episode_steps", 1), ("num_videos", 0)):
        if getattr(evaluation, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(evaluation, name)}.")
    if evaluation.real.num_envs != evaluation.model.num_envs:
        raise ValueError(
            f"`real` and `model` must have the same number of rows, got {evaluation.real.num_envs} and "
            f"{evaluation.model.num_envs}."
        )
    spaces: list[Any] = [each.single_observation_space for each in (evaluation.real, evaluation.model)]
    keys = [set(getattr(space, "spaces", {})) for space in spaces]
    if "pixels" not in keys[0]:
        raise ValueError(
            f"the observations of `real` must contain `pixels`, got {', '.join(sorted(keys[0])) or spaces[0]}: create the "
            "environment with images, for example with `obs_type` pixels_agent_pos."
        )
    if not keys[0] <= keys[1]:
        raise ValueError(
            f"the observations of `model` must contain {', '.join(sorted(keys[0]))}, like those of `real`, got "
            f"{', '.join(sorted(keys[1]))}: create `real` without the other observations (`agent_pos` requires a "
            "proprioception model, or `starts` with states and motions of known derivation)."
        )
    if spaces[0]["pixels"].shape != spaces[1]["pixels"].shape:
        raise ValueError(
            f"the frames of `real` must be {spaces[1]['pixels'].shape} for this world model, got {spaces[0]['pixels'].shape}."
        )
    limit = getattr(evaluation.model, "max_episode_steps", evaluation.max_episode_steps)
    if limit < evaluation.max_episode_steps:
        raise ValueError(f"`model` must allow {evaluation.max_episode_steps} steps per episode, got {limit}.")


def _setting(evaluation: PolicyEvaluation) -> dict[str, Any]:
    return dict(evaluation.setting) | {
        "policies": list(evaluation.policies),
        "seeds": [int(seed) for seed in evaluation.seeds],
        "max_episode_steps": evaluation.max_episode_steps,
        "num_envs": evaluation.real.num_envs,
    }


class _LoadedPolicies:
    """Policies by name. A policy given as a loader is loaded on access and replaces the last loaded one."""

    def __init__(self, policies: Mapping[str, Any]) -> None:
        self._policies, self._name, self._loaded = policies, "", None

    def __getitem__(self, name: str) -> Policy:
        if hasattr(self._policies[name], "select_action"):
            return self._policies[name]
        if name != self._name:
            self._loaded = None  # frees its memory before the next one is loaded
            self._loaded, self._name = self._policies[name](), name
        return self._loaded  # type: ignore[return-value]


def _check_policy(evaluation: PolicyEvaluation, name: str, policies: _LoadedPolicies) -> None:
    """Load a policy and call it once, so that all policies are known to work before the first episode."""
    policy = policies[name]
    if not hasattr(policy, "select_action") or not hasattr(policy, "reset"):
        raise ValueError(f"policy {name!r} must have `select_action` and `reset`, got {type(policy).__name__}.")
    rows = evaluation.real.num_envs
    observation, _ = evaluation.real.reset(seed=[int(evaluation.seeds[0])] * rows)  # type: ignore[arg-type]
    try:
        policy.reset()
        actions = np.asarray(policy.select_action(observation), dtype=np.float32)
    except Exception as error:  # policies raise errors of any type
        raise ValueError(f"policy {name!r} fails on the first observation: {type(error).__name__}: {error}") from error
    if actions.shape != evaluation.real.action_space.shape:
        raise ValueError(
            f"policy {name!r} must return actions {evaluation.real.action_space.shape}, got {actions.shape}."
        )


def _run_batch(evaluation: PolicyEvaluation, name: str, policy: Policy, batch: Sequence[int]) -> None:
    """Run a policy with the seeds of one batch in both environments, and write the outcomes."""
    rows = evaluation.real.num_envs
    seeds = [*batch, *[batch[-1]] * (rows - len(batch))]  # the repeated rows are discarded
    record = evaluation.num_videos > 0
    try:
        real = run_episodes(evaluation.real, policy, seeds, evaluation.max_episode_steps, record=record)
        observation, _ = evaluation.real.reset(seed=seeds)  # type: ignore[arg-type]
        states = observation.get("agent_pos", [None] * rows)
        starts = [Start(frame, state) for frame, state in zip(observation["pixels"], states, strict=True)]
        model = run_episodes(evaluation.model, policy, seeds, evaluation.max_episode_steps, starts, record)
    except ValueError as error:
        raise ValueError(f"policy {name!r}, seeds {batch[0]} to {batch[-1]}: {error}") from error
    fps = evaluation.model.metadata["render_fps"]
    check_result_folder(evaluation.output, _setting(evaluation), EPISODES, write=True)
    for row, seed in enumerate(batch):
        path = _path(Path(evaluation.output), name, seed)
        if record:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path.with_suffix(".mp4"), side_by_side(real.frames[row], model.frames[row]), fps)
        outcome: dict[str, Any] = {"seed": int(seed)}
        for place, episodes in (("real", real), ("model", model)):
            outcome[place] = {
                "success": bool(episodes.success[row]),
                "score": float(episodes.score[row]),
                "length": int(episodes.length[row]),
            }
        write_text(path, json.dumps(outcome))  # written last: it marks the episode as finished


def _check_actions(actions: np.ndarray, environment: VectorEnv, step: int) -> None:
    """Raise ValueError if actions have the wrong shape, or exceed a bound by more than the range width."""
    space: Any = environment.action_space
    if actions.shape != space.shape:
        raise ValueError(f"the policy must return actions {space.shape}, got {actions.shape} at step {step}.")
    if not hasattr(space, "low"):
        return
    width = np.where(np.isfinite(space.high - space.low), space.high - space.low, np.inf)
    outside = (actions < space.low - width) | (actions > space.high + width)
    if outside.any():
        raise ValueError(
            "the policy must return actions within or near the bounds of the environment, "
            f"[{space.low[outside][0]:g}, {space.high[outside][0]:g}], got {actions[outside][0]:g} at step {step}."
        )


def _successes(info: Mapping[str, Any], terminated: np.ndarray) -> np.ndarray:
    """Return the successes of the rows in a step; without reported ones, termination counts as success."""
    if "is_success" in info:
        return np.asarray(info["is_success"], bool)
    final = info.get("final_info", {})
    return np.asarray(final["is_success"], bool) if "is_success" in final else terminated


def side_by_side(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Join two videos (T, H, W, 3) horizontally; the last frame of the shorter one is repeated."""
    length = max(len(first), len(second))
    videos = [np.concatenate([video, video[-1:].repeat(length - len(video), axis=0)]) for video in (first, second)]
    return np.concatenate(videos, axis=2)


def _path(output: Path, name: str, seed: int) -> Path:
    return output / EPISODES / name / f"{seed}.json"


def _is_finished(evaluation: PolicyEvaluation, name: str, seed: int) -> bool:
    """Return whether an episode has an outcome and, if videos are requested, a video."""
    output = Path(evaluation.output)
    video = _path(output, name, seed).with_suffix(".mp4")
    recorded = not evaluation.num_videos or (video.is_file() and video.stat().st_size > 0)
    return recorded and _read_outcome(output, name, seed) is not None


def _read_outcome(output: Path, name: str, seed: int) -> dict[str, Any] | None:
    """Read the outcome of a finished episode; None if it is missing or damaged."""
    found = read_result(_path(output, name, seed), {"seed": int, **dict.fromkeys(ENVIRONMENTS, dict)})
    types = {"success": bool, "score": float, "length": int}
    if not found or found["seed"] != seed or not all(has_types(found[place], types) for place in ENVIRONMENTS):
        return None
    return found if all(found[place]["length"] > 0 for place in ENVIRONMENTS) else None


def _write_report(report: dict[str, Any], evaluation: PolicyEvaluation) -> None:
    """Write `report.json`, `report.md` and, for at least two policies, the plot."""
    output = Path(evaluation.output)
    report["videos"] = _choose_videos(evaluation)
    write_text(output / "report.json", json.dumps(report, indent=2))
    if len(report["policies"]) >= 2:
        _plot(report, output / "success.png")
    write_text(output / "report.md", policies_markdown(report))


def _choose_videos(evaluation: PolicyEvaluation) -> dict[str, list[dict[str, Any]]]:
    """Choose episodes of each policy, disagreements first."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for name in evaluation.policies if evaluation.num_videos else ():
        found = []
        for seed in evaluation.seeds:
            path = _path(Path(evaluation.output), name, seed)
            outcome = read_json_object(path, finite=True)
            successes = {place: outcome[place]["success"] for place in ENVIRONMENTS}
            video = path.with_suffix(".mp4").relative_to(evaluation.output)
            found.append({"seed": int(seed), "video": video.as_posix()} | successes)
        found.sort(key=lambda entry: entry["real"] == entry["model"])
        chosen[name] = found[: evaluation.num_videos]
    return chosen


def policies_markdown(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""

    def percent(value: Mapping[str, float]) -> str:
        return f"{value['mean']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"

    def number(value: Mapping[str, float]) -> str:
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    lines = [
        "# Policy evaluation",
        "",
        f"All policies use the same {report['num_seeds']} seeds in both environments. Values are means over the seeds with 95 % "
        "bootstrap intervals. The score of an episode is its largest reward.",
        "",
        "| policy | success, real | success, model | score, real | score, model | same outcome |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in report["policies"].items():
        cells = [name, *(percent(entry[place]["success"]) for place in ENVIRONMENTS)]
        cells += [*(number(entry[place]["score"]) for place in ENVIRONMENTS), percent(entry["same_outcome"])]
        lines.append(f"| {' | '.join(cells)} |")
    if "agreement" in report:
        lines += [
            "",
            f"Agreement of the two environments in the means of {len(report['policies'])} policies:",
            "",
            "| metric | success | score |",
            "|---|---|---|",
        ]
        names = {"pearson": "Pearson", "spearman": "Spearman", "mmrv": "MMRV (lower is better)"}
        for metric, label in names.items():
            cells = [_agreement_cell(report["agreement"][figure][metric]) for figure in ("success", "score")]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines += ["", "![success rates](success.png)"]
    if report.get("videos"):
        lines += ["", "Videos of episodes, with the real environment on the left and the model on the right:", ""]
        for name, entries in report["videos"].items():
            for each in entries:
                outcomes = ", ".join(f"{place} {'success' if each[place] else 'failure'}" for place in ENVIRONMENTS)
                lines.append(f"- [{name}, seed {each['seed']}]({each['video']}): {outcomes}")
    return "\n".join(lines) + "\n"


def _agreement_cell(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "undefined (constant values)"
    interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:.3f}{interval}"


def _plot(report: dict[str, Any], path: Path) -> None:
    """Plot the success rates in the model against those in the real environment, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for name, entry in report["policies"].items():
        real, model = (entry[place]["success"] for place in ENVIRONMENTS)
        errors = [
            np.maximum([[each["mean"] - each["low"]], [each["high"] - each["mean"]]], 0) for each in (real, model)
        ]
        axes.errorbar(real["mean"], model["mean"], xerr=errors[0], yerr=errors[1], fmt="o", capsize=2)
        axes.annotate(name, (real["mean"], model["mean"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="success rate, real environment",
        ylabel="success rate, world model",
        xlim=(-0.05, 1.05),
        ylim=(-0.05, 1.05),
    )
    with temporary_path(path) as partial:
        figure.savefig(partial, dpi=120, bbox_inches="tight")
