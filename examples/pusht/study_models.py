"""Train and load the policies, rewards and world models of the Push-T study."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import convolutional  # noqa: F401 - diffusers loads only classes of imported modules
import numpy as np
import torch
from collect import CAMERA, NAMES, TASKS
from diffusion_policy import DiffusionPolicy
from expert import coverage, ious
from simulator import FPS, SIZE, SUCCESS, Simulator
from train_reward import BLOCK

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.data import Episode, LeRobotFolder, is_written, write_file, write_metadata
from irasim_diffusers.devices import default_device
from irasim_diffusers.envs import load_world_model
from irasim_diffusers.files import temporary_folder
from irasim_diffusers.rewards import FrameRegressor

ROLLOUT_TASK = "Roll out a policy."
ROLLOUT_SEED = 6_000_000  # first seed of the policy rollouts used to train world models
EXAMPLES = Path(__file__).parent.parent


def run_example(*command: Any) -> None:
    """Run an example script in its own process.

    Raises:
        ValueError: If the script fails.
    """
    arguments = [sys.executable, *map(str, command)]
    if subprocess.run(arguments, check=False).returncode:
        raise ValueError(f"`{' '.join(arguments)}` failed: see the messages above.")


@functools.cache
def load_model(path: str, base: str) -> dict[str, Any]:
    """Load a world model, and the proprioception model of `base`, as arguments of an environment."""
    loaded = load_world_model(base)
    if path != base:
        loaded["model"] = load_world_model(path)["model"]
    return {"model": loaded["model"], "proprioception": loaded["proprioception"]}


@functools.cache
def load_policy(path: str) -> DiffusionPolicy:
    """Load a policy."""
    return DiffusionPolicy.from_pretrained(path).eval()


@functools.cache
def load_reward(path: str) -> FrameRegressor:
    """Load a reward network."""
    return FrameRegressor.from_pretrained(path).eval().requires_grad_(False).to(default_device())


class Progress:
    """Objective of the planners: IoU plus closeness, because the IoU is zero far from the goal.

    Args:
        folder: Folder of the two reward networks.
    """

    needs_pixels = True
    frame_size = (SIZE, SIZE)

    def __init__(self, folder: str) -> None:
        self.networks = [load_reward(f"{folder}/{target}") for target in ("iou", "closeness")]

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, n) of frames (B, n, 3, H, W)."""
        return sum(network(frames) for network in self.networks)


class CoverageScore:
    """Predict the score of gym-pusht from frames: coverage divided by `SUCCESS`, at most 1.

    Args:
        folder: Folder of the reward networks.
    """

    def __init__(self, folder: str) -> None:
        self.network = load_reward(f"{folder}/iou")

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, n) of frames (B, n, 3, H, W)."""
        return (coverage(self.network(frames)) / SUCCESS).clamp(max=1)


class Solved:
    """Success criterion: the predicted IoU exceeds a threshold.

    Args:
        folder: Folder of the reward networks.
        threshold: IoU from `success_threshold`.
    """

    def __init__(self, folder: str, threshold: float) -> None:
        self.network, self.threshold = load_reward(f"{folder}/iou"), threshold

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Return whether each of the frames (B, n, 3, H, W) shows a solved task, as bool (B, n)."""
        return self.network(frames) > self.threshold


def expert_episodes(dataset: Path) -> list[int]:
    """Return the indices of the episodes of the expert and the noisy expert.

    Raises:
        ValueError: If there are none.
    """
    kinds = [TASKS["expert"], TASKS["noisy"]]
    numbers = [number for number, row in enumerate(LeRobotFolder(dataset).rows) if row["tasks"][0] in kinds]
    if not numbers:
        raise ValueError(
            f"{str(dataset)!r} must have episodes of the expert, got none: collect some with `collect.py --expert 1`."
        )
    return numbers


@torch.no_grad()
def success_threshold(folder: Path, dataset: Path, numbers: list[int]) -> dict[str, float]:
    """Choose the threshold on the largest predicted IoU that best classifies success in the simulator.

    Among equally good thresholds, the middle one is returned. If all or none of the episodes are solved, the threshold is 0.9.

    Args:
        folder: Folder of the network that predicts the IoU.
        dataset: Folder of the episodes.
        numbers: Indices of the episodes, from `expert_episodes`.

    Returns:
        `threshold`, `accuracy` on these episodes, `solved` (fraction of solved episodes) and their number `n`.
    """
    network, source = FrameRegressor.from_pretrained(folder).eval(), LeRobotFolder(dataset)
    predicted, solved = [], []
    for number in numbers:
        episode = source[number]
        frames = torch.from_numpy(episode.frames).movedim(-1, 1).float() / 255
        predicted.append(float(network(frames).max()))
        solved.append(coverage(ious(episode.states[BLOCK].astype(np.float64)).max()) > SUCCESS)
    values, labels = np.array(predicted), np.array(solved)
    candidates = np.linspace(0.5, 1, 501)
    accuracy = ((values > candidates[:, None]) == labels).mean(1)
    best = candidates[accuracy == accuracy.max()]
    threshold = float(best[len(best) // 2]) if labels.any() and not labels.all() else 0.9
    return {
        "threshold": threshold,
        "accuracy": float(((values > threshold) == labels).mean()),
        "solved": float(labels.mean()),
        "n": len(labels),
    }


def write_demonstrations(root: Path, datasets: list[Path], max_episodes: int) -> None:
    """Copy the first expert episodes of the datasets to one LeRobotDataset folder."""
    if (root / "meta" / "info.json").is_file():
        return
    episodes: list[Episode] = []
    for path in datasets:
        folder = LeRobotFolder(path)
        experts = [number for number, row in enumerate(folder.rows) if row["tasks"][0] == TASKS["expert"]]
        episodes += [folder[number] for number in experts[: max_episodes - len(episodes)]]
    _write(root, episodes, TASKS["expert"])


def write_rollouts(root: Path, policies: list[str], num_episodes: int, length: int, num_executed: int) -> None:
    """Run the policies in turn in the simulator, and write the episodes as a LeRobotDataset folder."""
    if (root / "meta" / "info.json").is_file():
        return
    episodes = [
        roll_out(load_policy(policies[number % len(policies)]), ROLLOUT_SEED + number, length, num_executed)
        for number in range(num_episodes)
    ]
    _write(root, episodes, ROLLOUT_TASK)


def roll_out(policy: DiffusionPolicy, seed: int, length: int, num_executed: int) -> Episode:
    """Run a policy in the simulator, and record `length` frames."""
    simulator, generator = Simulator(), torch.Generator().manual_seed(seed)
    state = simulator.reset(seed)
    frames, states, actions = [], [], []
    for step in range(length):
        frames.append(simulator.frame())
        if step % num_executed == 0:
            observation = {"pixels": frames[-1][None], "agent_pos": state.agent[None]}
            chunk = policy.sample(observation, generator=generator)[0, 0].numpy()
        states.append(state)
        actions.append(chunk[step % num_executed])
        state = simulator.step(actions[-1])
    return Episode(
        frames=np.stack(frames),
        actions=np.stack(actions),
        states={
            "observation.state": np.stack([state.agent for state in states]).astype(np.float32),
            BLOCK: np.stack([state.block for state in states]).astype(np.float32),
        },
        task=ROLLOUT_TASK,
    )


def _write(root: Path, episodes: list[Episode], task: str) -> None:
    if not is_written(root, 0):
        write_file(root, 0, episodes, fps=FPS, camera=CAMERA, tasks=[task])
    write_metadata(
        root, fps=FPS, camera=CAMERA, frame_size=(SIZE, SIZE), names=NAMES, tasks=[task], robot_type="gym_pusht"
    )


def write_random_pipeline(root: Path, base: Path, seed: int) -> None:
    """Write the pipeline `base` with a transformer of random weights, and copy its proprioception model."""
    if (root / "proprioception").is_dir():
        return
    pipeline = IRASimPipeline.from_pretrained(base)
    torch.manual_seed(seed)
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config(pipeline.transformer.config))
    pipeline.save_pretrained(root)
    copy_proprioception(base, root)


def copy_proprioception(base: Path, root: Path) -> None:
    """Copy the proprioception model of a pipeline; its presence marks a complete world model."""
    with temporary_folder(root / "proprioception") as partial:
        shutil.copytree(base / "proprioception", partial, dirs_exist_ok=True)


def fine_tune(root: Path, base: Path, datasets: list[Path], max_train_steps: int, cache: Path, seed: int) -> None:
    """Fine-tune the world model `base`, and copy its proprioception model.

    An interrupted run resumes. With `max_train_steps` 0, `base` is copied without training.
    """
    if max_train_steps:
        run_example(
            *(EXAMPLES / "train.py", "--dataset", *datasets, "--output_dir", root, "--cache_dir", cache),
            *("--pretrained_model_name_or_path", base, "--max_train_steps", max_train_steps, "--seed", seed),
            *("--train_batch_size", 16, "--learning_rate", 1e-4, "--lr_scheduler", "cosine", "--lr_warmup_steps", 10),
            *("--max_grad_norm", 1, "--ema_decay", 0.99, "--action_dropout", 0, "--terminal_share", 0.7),
            *("--history_noise", 0, "--huber_c", 0.02, "--crop_size", 64, "--rollout_chunks", 2),
            *("--checkpointing_steps", 250),
            *([] if torch.cuda.is_available() else ["--attention_backend", "_native_math"]),
        )
    else:
        IRASimPipeline.from_pretrained(base).save_pretrained(root)
    if not (root / "proprioception").is_dir():
        copy_proprioception(base, root)
