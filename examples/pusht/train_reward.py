"""Train a small network that predicts, from one Push-T frame, how well the block covers the goal.

    python examples/pusht/train_reward.py --dataset data/pusht-train --test_dataset data/pusht-test --model runs/pusht

The label is the intersection over union (IoU) of block and goal in the simulator (paper, section 4.3), or their
closeness: 1 - d / 256, at least 0, for a mean distance of d arena units of the block's corners from their goal positions. The
IoU is zero in most frames, so the closeness guides a planner better if the block is far from the goal. The network
receives only the frame. Frames are augmented with blur, color shifts and noise, so that the network also works on
frames of a world model. With `--test_dataset`, the report compares the error on held-out simulator frames with the
error on frames that the world model predicts for held-out actions.

By default, the network is stored in the folder `reward` of `--model`, where `irasim_diffusers.envs` finds it.
`--max_train_steps 0` only repeats the evaluation, for example after a change of the world model.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from collect import check_states
from expert import distance_to_goal, ious
from torch.nn import functional
from tqdm import tqdm
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint, roll
from irasim_diffusers.data import EpisodeSource, open_dataset
from irasim_diffusers.files import write_text
from irasim_diffusers.metrics import bootstrap
from irasim_diffusers.rewards import FrameRegressor
from irasim_diffusers.training import check_output_dir, check_ranges, run_script

BLOCK = "observation.environment_state"
SCALE = 256.0  # distance at which the closeness is 0, arena units
TARGETS = ("iou", "closeness")


@dataclass
class RewardArguments:
    dataset: str = field(metadata={"help": "LeRobotDataset folder made by collect.py"})
    model: str | None = field(
        default=None,
        metadata={
            "help": "world model that predicts the frames of the report, folder or Hub id (default: the embedded model)"
        },
    )
    output_dir: Path | None = field(
        default=None,
        metadata={
            "help": "folder for the network and report.json (default: the folder reward of --model; required unless --model is a "
            "local folder)"
        },
    )
    test_dataset: str | None = field(
        default=None,
        metadata={"help": "held-out dataset on which the errors are measured (default: none are measured)"},
    )
    target: str = field(default="iou", metadata={"help": "iou or closeness"})
    max_episodes: int = field(default=1500, metadata={"help": "maximum number of training episodes"})
    frames_per_episode: int = field(default=24, metadata={"help": "number of frames to read per episode"})
    max_train_steps: int = field(
        default=4000, metadata={"help": "number of training steps; 0 only evaluates the stored network"}
    )
    batch_size: int = field(default=64, metadata={"help": "frames per training step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "maximum learning rate"})
    success_threshold: float = field(
        default=0.9, metadata={"help": "minimum score of a success; an IoU of 0.905 corresponds to 95 %% coverage"}
    )
    num_clips: int = field(default=100, metadata={"help": "number of held-out clips that the world model predicts"})
    num_predicted_frames: int = field(default=15, metadata={"help": "number of predicted frames per clip"})
    seed: int = field(default=0, metadata={"help": "random seed"})


def labels(blocks: np.ndarray, target: str) -> np.ndarray:
    """Compute the labels (N,), in [0, 1], of blocks at poses (N, 3)."""
    blocks = blocks.astype(np.float64)
    return ious(blocks) if target == "iou" else np.clip(1 - distance_to_goal(blocks) / SCALE, 0, 1)


def read_labeled_frames(dataset: EpisodeSource, arguments: RewardArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Read frames (N, 3, H, W), uint8, evenly spaced in each episode, and their labels (N,)."""
    frames, values = [], []
    for number in tqdm(range(min(len(dataset), arguments.max_episodes)), desc="reading", unit="episode"):
        episode = dataset[number]
        taken = np.linspace(0, len(episode) - 1, arguments.frames_per_episode).round().astype(int)
        frames.append(torch.from_numpy(episode.frames[taken]).permute(0, 3, 1, 2))
        values.append(torch.from_numpy(labels(episode.states[BLOCK][taken], arguments.target)).float())
    return torch.cat(frames), torch.cat(values)


def augment(frames: torch.Tensor) -> torch.Tensor:
    """Blur half of the frames (B, 3, H, W); add noise per pixel, per 4x4 patch and per color to all."""
    size = len(frames)
    blurred = functional.avg_pool2d(functional.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(size, 1, 1, 1) * (torch.rand(size, 1, 1, 1) < 0.5)
    frames = frames + share * (blurred - frames)
    strength = 0.05 * torch.rand(size, 1, 1, 1)
    patches = torch.randn(*frames.shape[:2], frames.shape[2] // 4, frames.shape[3] // 4)
    patches = functional.interpolate(patches, frames.shape[2:], mode="bilinear")
    colors = 0.02 * torch.randn(size, 3, 1, 1)
    return (frames + strength * (torch.randn_like(frames) + patches) + colors).clamp(0, 1)


def train(network: FrameRegressor, frames: torch.Tensor, values: torch.Tensor, arguments: RewardArguments) -> None:
    """Minimize the squared error; frames with rare labels are drawn more often.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    bins = (values * 10).long().clamp(max=9)
    weights = 1 / bins.bincount(minlength=10).clamp(min=1)[bins].sqrt()
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, arguments.max_train_steps)
    bar = tqdm(range(arguments.max_train_steps), desc="training", unit="step")
    for step in bar:
        rows = torch.multinomial(weights, arguments.batch_size, replacement=True)
        error = network(augment(frames[rows].float() / 255)) - values[rows]
        loss = error.square().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: use a lower `learning_rate`.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(rmse=f"{loss.sqrt():.4f}")


@torch.no_grad()
def predicted_clips(
    dataset: EpisodeSource, arguments: RewardArguments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return predicted frames (N, n, 3, H, W), the simulator frames, and their labels (N, n).

    Raises:
        ValueError: If an episode is too short.
    """
    pipeline = IRASimPipeline.from_pretrained(arguments.model or embedded_checkpoint())
    pipeline.set_progress_bar_config(disable=True)
    history, length = pipeline.transformer.config.num_history_frames, arguments.num_predicted_frames
    rng = np.random.default_rng(arguments.seed)
    predicted, true, values = [], [], []
    for number in tqdm(range(arguments.num_clips), desc="predicting", unit="clip"):
        episode = dataset[int(number % len(dataset))]
        if len(episode) < history + length:
            remedy = "use a smaller `num_predicted_frames`" if len(episode) > history else "use longer episodes"
            raise ValueError(
                f"episodes of {dataset.name!r} must have at least {history + length} frames, got {len(episode)}: {remedy}."
            )
        last = int(rng.integers(history - 1, len(episode) - length))
        state = pipeline.start(episode.frames[last - history + 1 : last + 1], [number])
        actions = torch.from_numpy(episode.actions[None, last : last + length]).float()
        latents = torch.cat([latents for _, latents in roll(pipeline, state, actions)], dim=2)
        predicted.append(pipeline.decode(latents))
        future = slice(last + 1, last + length + 1)
        true.append(torch.from_numpy(episode.frames[future]).permute(0, 3, 1, 2)[None] / 255)
        values.append(torch.from_numpy(labels(episode.states[BLOCK][future], arguments.target)).float()[None])
    return torch.cat(predicted), torch.cat(true), torch.cat(values)


@torch.no_grad()
def evaluate(
    network: FrameRegressor, clips: tuple[torch.Tensor, torch.Tensor, torch.Tensor], arguments: RewardArguments
) -> dict[str, dict]:
    """Measure the mean absolute error with a 95 % interval over clips, correlation, bias and successes.

    The metrics are computed for frames of the simulator and of the model, over all frames and over the last frame of each clip.
    `clips` is the result of `predicted_clips`.
    """
    predicted, true, values = clips
    rng = np.random.default_rng(arguments.seed)
    report = {}
    for name, frames in (("simulator", true), ("model", predicted)):
        scores = network(frames)
        for part, taken in (("frames", slice(None)), ("last_frame", slice(-1, None))):
            errors = (scores - values)[:, taken]
            report[f"{name}_{part}"] = bootstrap(errors.abs().mean(1).numpy(), rng) | {
                "pearson": float(np.corrcoef(scores[:, taken].flatten(), values[:, taken].flatten())[0, 1]),
                "bias": float(errors.mean()),
                "successes": int((values[:, taken] >= arguments.success_threshold).sum()),
                "wrong_successes": int(
                    (network.success(frames[:, taken]) != (values[:, taken] >= arguments.success_threshold)).sum()
                ),
            }
    return report


def main() -> None:
    (arguments,) = HfArgumentParser(RewardArguments).parse_args_into_dataclasses()
    check_ranges(
        arguments,
        not_negative=("max_train_steps", "seed"),
        at_least_1=("max_episodes", "frames_per_episode", "batch_size", "num_clips", "num_predicted_frames"),
        positive=("learning_rate",),
        choices={"target": TARGETS},
    )
    if arguments.output_dir is None and not (arguments.model and Path(arguments.model).is_dir()):
        raise ValueError(
            f"`output_dir` is required unless `model` is the folder of a pipeline, got `model` {arguments.model!r}: pass "
            "--output_dir to save the network in a new folder, or --model to add it to a pipeline."
        )
    output_dir = arguments.output_dir or Path(arguments.model or "") / "reward"
    check_output_dir(output_dir)
    dataset, test_dataset = open_dataset(arguments.dataset), None
    check_states(dataset, states=(BLOCK,))
    if arguments.test_dataset:
        test_dataset = open_dataset(arguments.test_dataset)
        check_states(test_dataset, states=(BLOCK,))
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    # predicted first, so that a short episode is found before the training
    clips = predicted_clips(test_dataset, arguments) if test_dataset else None
    if arguments.max_train_steps:
        frames, values = read_labeled_frames(dataset, arguments)
        network = FrameRegressor(
            *frames.shape[-2:], target=arguments.target, success_threshold=arguments.success_threshold
        )
        train(network, frames, values, arguments)
        network.eval().save_pretrained(output_dir)
    else:
        network = FrameRegressor.from_pretrained(output_dir).eval()
    report = {} if clips is None else evaluate(network, clips, arguments)
    for name, metrics in report.items():
        print(f"{name}: MAE {metrics['mean']:.4f} [{metrics['low']:.4f}, {metrics['high']:.4f}]", end=", ")
        print(f"Pearson {metrics['pearson']:.3f}, bias {metrics['bias']:+.4f}, n {metrics['n']},", end=" ")
        print(f"{metrics['wrong_successes']} misclassified frames, {metrics['successes']} successes")
    report["setting"] = asdict(arguments) | {
        "output_dir": str(output_dir),
        "command": " ".join(["python", *sys.argv]),
        "minutes": (time.perf_counter() - started) / 60,
    }
    write_text(output_dir / "report.json", json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
