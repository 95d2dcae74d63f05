"""`irasim evaluate-policies`: success rates of policies in a world model and a real environment."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import embedded_checkpoint
from ..files import file_hash
from ..hub import missing_reason
from ..version import INSTALL
from .files import check_flag_ranges, check_name, check_output_folder
from .loading import check_weights, load_reward, quiet_loading
from .sampling import check_device

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..policies import Policy

LIMITS = {
    "num_episodes": (1, 100_000),
    "max_episode_steps": (1, 100_000),
    "batch_size": (1, 1024),  # all episodes of a batch are in memory
    "steps": (1, 1000),
    "first_seed": (0, 2**31 - 1),  # some environments accept only 32-bit seeds
    "num_videos": (0, None),
}
"""Lowest and highest value of each flag; except for the seed, the highest bounds the memory and time that a flag can request."""


def add_parser(subparsers: Any) -> None:
    """Add `evaluate-policies` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "evaluate-policies",
        help="compare the success rates of policies in the model and in a real environment",
        description="Run policies from the same starts in a Gymnasium environment and in the world model, and report success rates "
        "and how well they agree. Run the same command again to resume. Under `accelerate launch -m irasim_diffusers.cli "
        "evaluate-policies`, several processes share the episodes.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--policies",
        nargs="+",
        required=True,
        help="folders or Hub ids of LeRobot policies, or paths for --loader",
    )
    add(
        "--loader",
        metavar="MODULE:FUNCTION",
        help="function that loads a policy from its path, an ActionSpace and optionally `device`",
    )
    add("--env", required=True, help="Gymnasium id with image observations, such as gym_pusht:gym_pusht/PushT-v0")
    add(
        "--env-kwargs",
        default="{}",
        help='JSON arguments of the environment, such as {"obs_type": "pixels_agent_pos"}',
    )
    add(
        "--model",
        default=str(embedded_checkpoint()),
        help="pipeline folder or Hub id (default: the embedded Push-T model)",
    )
    add("--reward", help="folder or Hub id of a FrameRegressor (default: the reward stored with the model)")
    add(
        "--success-threshold",
        type=float,
        help="minimum reward that counts as success (default: the threshold stored with the reward, or 0.9)",
    )
    add("--steps", type=int, help="denoising steps per frame (default: the model's)")
    add("--device", help="cpu, cuda, ... (default: cuda if available)")
    add("--num-episodes", type=int, default=50, help="episodes per policy (default: %(default)s)")
    add("--first-seed", type=int, default=100_000, help="seed of the first episode (default: %(default)s)")
    add("--max-episode-steps", type=int, default=300, help="maximum steps per episode (default: %(default)s)")
    add("--batch-size", type=int, default=10, help="number of episodes that run together (default: %(default)s)")
    add(
        "--num-videos",
        type=int,
        default=2,
        help="videos per policy in the report, disagreements first (default: %(default)s)",
    )
    add("--output", type=Path, default=Path("irasim-policies"), help="folder to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Check the input, run the episodes, and print the agreement."""
    start = time.perf_counter()
    names = _check_flags(arguments)
    load = _find_loader(arguments.loader)
    with closing(_real_environment(arguments)) as real:
        from accelerate import PartialState

        from ..envs import WorldModelVectorEnv
        from ..evaluation import PolicyEvaluation, evaluate_policies

        state = PartialState()
        stored = _load_world_model(arguments)
        model = WorldModelVectorEnv(
            num_envs=arguments.batch_size,
            clip_actions=True,
            max_episode_steps=arguments.max_episode_steps,
            autoreset_mode="Disabled",
            sampling={} if arguments.steps is None else {"num_inference_steps": arguments.steps},
            **stored,
        )
        folders = {name: _policy_files(path, arguments.loader) for name, path in names.items()}
        recorded = ("model", "env", "env_kwargs", "loader", "reward", "success_threshold", "steps")
        report = evaluate_policies(
            PolicyEvaluation(
                {name: partial(_load_policy, load, path, stored["model"]) for name, path in names.items()},
                real,
                model,
                arguments.output,
                range(arguments.first_seed, arguments.first_seed + arguments.num_episodes),
                arguments.max_episode_steps,
                arguments.num_videos,
                setting={"paths": names, "files": {name: _files_hash(folder) for name, folder in folders.items()}}
                | {name: getattr(arguments, name) for name in recorded}
                | {"weights": _weights(stored)},
            )
        )
    if state.is_main_process:
        _print_report(report)
        print(f"{time.perf_counter() - start:.0f} s; wrote {arguments.output / 'report.md'}")


def _check_flags(arguments: argparse.Namespace) -> dict[str, str]:
    """Check the flags that need neither policies nor a model; return the policies' paths by name."""
    check_output_folder(arguments.output)
    for flag in ("model", "reward"):
        check_name(f"--{flag}", getattr(arguments, flag))
    for path in arguments.policies:
        check_name("--policies", path)
    if arguments.device is not None:
        check_device(arguments.device)
    check_flag_ranges(arguments, LIMITS)
    arguments.batch_size = min(arguments.batch_size, arguments.num_episodes)
    if arguments.success_threshold is not None and not abs(arguments.success_threshold) < float("inf"):
        raise ValueError(f"--success-threshold must be finite, got {arguments.success_threshold}.")
    parts = [Path(path).parts for path in arguments.policies]
    for depth in range(1, max(map(len, parts)) + 1):  # add parent folders until the names are unique
        names = ["-".join(part.strip("/.") or "root" for part in each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, arguments.policies, strict=True))
    raise ValueError(f"--policies must be unique, got {', '.join(arguments.policies)}.")


def _find_loader(path: str | None) -> Callable[..., Policy]:
    """Return the callable at `path`, or the loader of LeRobot policies if `path` is None."""
    from ..policies import LeRobotPolicy
    from ..pretrained import import_callable

    return LeRobotPolicy.from_pretrained if path is None else import_callable("--loader", path)


def _policy_files(path: str, loader: str | None) -> Path | None:
    """Return the file or folder of a policy, downloaded from the Hub if necessary.

    The result is None if `path` does not exist and a custom loader interprets it.
    """
    from ..policies import policy_folder

    if Path(path).exists() or loader is not None:
        return Path(path) if Path(path).exists() else None
    try:
        return policy_folder(path)
    except ValueError as error:
        raise ValueError(f"--policies {path!r} cannot be loaded: {missing_reason(path, error) or error}") from error


def _load_policy(load: Callable[..., Policy], path: str, model: Any) -> Policy:
    """Load a policy; the device of the model is passed to loaders with an argument `device`."""
    try:
        options = {"device": str(model.device)} if "device" in inspect.signature(load).parameters else {}
        with quiet_loading():
            return load(path, model.action_space, **options)
    except Exception as error:  # loaders raise errors of any type
        raise ValueError(f"--policies {path!r} cannot be loaded: {error}") from error


def _load_world_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the world model with its reward and success function."""
    from ..envs import load_world_model

    try:
        with quiet_loading() as messages:
            stored = load_world_model(arguments.model, arguments.device) | {"starts": None}
        components = stored["model"].components | {name: stored.get(name) for name in ("proprioception", "reward")}
        check_weights(components, messages)
    except Exception as error:  # the loaders raise errors of many types for damaged files
        reason = missing_reason(arguments.model, error) or error
        raise ValueError(f"--model must be a pipeline folder or Hub id, got {arguments.model!r}: {reason}") from error
    return stored | _reward_and_success(arguments, stored)


def _weights(stored: dict[str, Any]) -> dict[str, str]:
    """Return hashes of the weights of the pipeline, the proprioception model and the reward."""
    from ..evaluation.predictors import pipeline_hash, weights_hash

    others = {name: weights_hash([stored.get(name)]) for name in ("proprioception", "reward")}
    return {"model": pipeline_hash(stored["model"])} | others


def _files_hash(root: Path | None) -> str | None:
    """Hash the names and contents of a policy's files; None without files."""
    if root is None or not root.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if file.is_file():
            digest.update(f"{file.relative_to(root)}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()


def _real_environment(arguments: argparse.Namespace) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError(f"`irasim evaluate-policies` requires Gymnasium: {INSTALL.format('envs')}.") from error
    try:
        options = json.loads(arguments.env_kwargs)
        if not isinstance(options, dict):
            raise ValueError("the value is not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--env-kwargs must be a JSON object, got {arguments.env_kwargs[:100]!r}: {error}."
        ) from error
    if "max_episode_steps" in options:
        raise ValueError("--env-kwargs must not contain max_episode_steps: use --max-episode-steps.")
    options |= {"max_episode_steps": arguments.max_episode_steps}
    try:
        return gymnasium.make_vec(arguments.env, arguments.batch_size, vectorization_mode="sync", **options)
    except Exception as error:  # environments raise errors of any type
        raise ValueError(f"--env {arguments.env!r} with {options} cannot be created: {error}") from error


def _reward_and_success(arguments: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the reward and the success function: from the flags, or stored with the model."""
    reward = stored.get("reward")
    if arguments.reward is not None:
        reward = load_reward(arguments.reward, stored["model"].device)
    if reward is None:
        raise ValueError(f"--reward is required, because {arguments.model!r} contains no reward model.")
    threshold = arguments.success_threshold
    if threshold is None:
        threshold = reward.config.success_threshold
    return {"reward": reward, "success": partial(_exceeds, reward, 0.9 if threshold is None else threshold)}


def _exceeds(reward: Callable[[torch.Tensor], torch.Tensor], threshold: float, frames: torch.Tensor) -> torch.Tensor:
    return reward(frames) >= threshold


def _print_report(report: dict[str, Any]) -> None:
    for name, entry in report["policies"].items():
        real, model = (entry[place]["success"]["mean"] for place in ("real", "model"))
        print(
            f"{name}: success {real:.0%} real, {model:.0%} in the model, same outcome {entry['same_outcome']['mean']:.0%}"
        )
    for figure, found in report.get("agreement", {}).items():
        values = [f"{name} {each['value']:.3f}" for name, each in found.items() if each["value"] is not None]
        print(f"{figure}: {', '.join(values)}")
