"""Train the proprioception model of a world model, which predicts the robot state from a frame.

    python examples/pusht/train_proprioception.py --dataset data/pusht-train --validation_dataset data/pusht-test \
        --model runs/pusht

Half of each batch consists of recorded frames, the other half of frames that the world model predicts from recorded
histories and actions. The targets are the recorded states. By default, the network is stored in the folder `proprioception`
of `--model`, where `irasim_diffusers.envs` finds it. The errors on recorded and predicted validation frames are
printed, and stored in `metrics.json` next to the network.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, ProprioceptionModel, embedded_checkpoint, roll
from irasim_diffusers.data import EpisodeSource, open_dataset
from irasim_diffusers.devices import fast_dtype
from irasim_diffusers.files import write_text
from irasim_diffusers.training import check_output_dir, check_ranges, run_script, save_finished


@dataclass
class ProprioceptionArguments:
    dataset: str = field(metadata={"help": "LeRobotDataset folder with states"})
    validation_dataset: str = field(metadata={"help": "held-out LeRobotDataset folder"})
    model: str | None = field(
        default=None,
        metadata={"help": "pipeline that predicts frames, folder or Hub id (default: the embedded model)"},
    )
    output_dir: Path | None = field(
        default=None,
        metadata={
            "help": "folder for the network and metrics.json (default: the folder proprioception of --model; required unless "
            "--model is a local folder)"
        },
    )
    state_key: str = field(default="observation.state", metadata={"help": "feature that contains the robot state"})
    state_low: list[float] = field(
        default_factory=lambda: [0.0, 0.0], metadata={"help": "lower bound of each state component"}
    )
    state_high: list[float] = field(
        default_factory=lambda: [512.0, 512.0], metadata={"help": "upper bound of each state component"}
    )
    num_windows: int = field(default=250, metadata={"help": "number of recorded training windows"})
    num_rollouts: int = field(
        default=48, metadata={"help": "number of training windows that the world model also predicts"}
    )
    num_validation_windows: int = field(
        default=32, metadata={"help": "number of validation windows; the world model predicts all of them"}
    )
    num_predicted: int = field(default=15, metadata={"help": "predicted frames per window"})
    max_train_steps: int = field(
        default=500, metadata={"help": "number of training steps; 0 only evaluates the stored network"}
    )
    batch_size: int = field(default=32, metadata={"help": "frames per step, half recorded and half predicted"})
    learning_rate: float = field(default=4e-3, metadata={"help": "maximum learning rate"})
    seed: int = field(default=0, metadata={"help": "random seed"})


def draw_windows(
    source: EpisodeSource,
    pipeline: IRASimPipeline,
    arguments: ProprioceptionArguments,
    windows: int,
    rollouts: int,
    seed: int,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draw windows of episodes, and predict the first `rollouts` windows from their histories.

    Returns:
        `recorded` and `predicted`: frames (N, 3, H, W), uint8, and their states (N, S).

    Raises:
        ValueError: If an episode is shorter than a window.
    """
    rng = np.random.default_rng(seed)
    history, length = pipeline.transformer.config.num_history_frames, arguments.num_predicted
    drawn = []
    for _ in tqdm(range(windows), desc="windows"):
        number = int(rng.integers(len(source)))
        frames = len(source.vectors(number)["action"])
        if frames < history + length:
            remedy = "use a smaller `num_predicted`" if frames > history else "use longer episodes"
            raise ValueError(
                f"episodes of {source.name!r} must have at least {history + length} frames, got {frames} in episode {number}: "
                f"{remedy}."
            )
        start = int(rng.integers(frames - history - length + 1))
        drawn.append(source.window(number, start, history + length))
    predicted = []
    for first in tqdm(range(0, rollouts, 16), desc="rollouts"):
        batch = drawn[first : min(first + 16, rollouts)]
        state = pipeline.start(np.stack([window.frames[:history] for window in batch]), range(len(batch)))
        actions = torch.from_numpy(np.stack([window.actions[history - 1 : -1] for window in batch]))
        with torch.no_grad():
            videos = torch.cat([pipeline.decode(latents) for _, latents in roll(pipeline, state, actions)], dim=1)
        predicted.append((255 * videos).round().byte().flatten(0, 1))
    recorded = torch.from_numpy(np.concatenate([window.frames[history:] for window in drawn])).movedim(-1, 1)
    states = np.concatenate([window.states[arguments.state_key][history:] for window in drawn])
    targets = torch.from_numpy(states).float()
    return {"recorded": (recorded, targets), "predicted": (torch.cat(predicted), targets[: rollouts * length])}


def augment(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change brightness, contrast and sharpness of frames (B, 3, H, W) in [0, 1], and add noise."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(frames), 1, 1, 1, generator=generator)

    blurred = functional.avg_pool2d(functional.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    frames = torch.lerp(frames, blurred, uniform(-0.3, 1.0))
    frames = (frames - 0.5) * uniform(0.9, 1.1) + 0.5 + uniform(-0.05, 0.05)
    return frames + uniform(0, 0.03) * torch.randn(frames.shape, generator=generator)


def train(
    data: dict[str, tuple[torch.Tensor, torch.Tensor]], names: list[str], arguments: ProprioceptionArguments
) -> ProprioceptionModel:
    """Train a model on `recorded` and `predicted` frames.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    offset, scale = data["recorded"][1].mean(0), 1 / data["recorded"][1].std(0)
    model = ProprioceptionModel(
        names, arguments.state_low, arguments.state_high, offset.tolist(), scale.tolist()
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), arguments.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, arguments.max_train_steps, pct_start=0.1
    )
    progress = tqdm(range(arguments.max_train_steps), desc="steps")
    for step in progress:
        frames, states = [], []
        for part, targets in data.values():
            chosen = torch.randint(len(part), (arguments.batch_size // 2,), generator=generator)
            frames.append(part[chosen])
            states.append(targets[chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype("cpu") == torch.bfloat16):
            prediction = model(augment(torch.cat(frames).float() / 255, generator))
        loss = functional.smooth_l1_loss(prediction * scale, torch.cat(states) * scale, beta=0.02)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: use a lower `learning_rate`.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()


def errors(model: ProprioceptionModel, frames: torch.Tensor, states: torch.Tensor, unit: float) -> dict[str, float]:
    """Return distances between predicted and true states (N, S): median, mean and 95th percentile.

    Each value is in units of the state and, with the suffix `_px`, in pixels. `frames` is the number of frames.

    Args:
        model: The trained network.
        frames: Frames (N, 3, H, W), uint8.
        states: True states (N, S).
        unit: Pixels per unit of the state.
    """
    readings = torch.cat([model.read(part.float() / 255) for part in frames.split(256)])
    distances = torch.linalg.vector_norm(readings - states, dim=-1).numpy()
    metrics = {"median": np.median(distances), "mean": distances.mean(), "p95": np.quantile(distances, 0.95)}
    report = {"frames": len(frames), **metrics, **{f"{name}_px": value * unit for name, value in metrics.items()}}
    return {name: round(float(value), 3) for name, value in report.items()}


def check_arguments(arguments: ProprioceptionArguments) -> None:
    """Check the arguments before anything is read.

    Raises:
        ValueError: If a value is out of range, or no folder for the result is given.
    """
    check_ranges(
        arguments,
        not_negative=("seed", "max_train_steps"),
        at_least_1=("num_windows", "num_rollouts", "num_validation_windows", "num_predicted"),
        positive=("learning_rate",),
    )
    if arguments.batch_size < 2:
        raise ValueError(f"`batch_size` must be at least 2, one frame of each kind, got {arguments.batch_size}.")
    if arguments.num_rollouts > arguments.num_windows:
        raise ValueError(
            f"`num_rollouts` must be at most `num_windows` ({arguments.num_windows}), got {arguments.num_rollouts}."
        )
    if arguments.output_dir is None and not (arguments.model and Path(arguments.model).is_dir()):
        raise ValueError(
            f"`output_dir` is required unless `model` is the folder of a pipeline, got `model` {arguments.model!r}: pass "
            "--output_dir to save the network in a new folder, or --model to add it to a pipeline."
        )


def main() -> None:
    (arguments,) = HfArgumentParser(ProprioceptionArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    output = arguments.output_dir or Path(arguments.model or "") / "proprioception"
    check_output_dir(output)
    began = time.perf_counter()
    pipeline = IRASimPipeline.from_pretrained(arguments.model or embedded_checkpoint(), dtype=fast_dtype("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    training, validation = open_dataset(arguments.dataset), open_dataset(arguments.validation_dataset)
    for source in (training, validation):
        known = sorted(source.vectors(0).keys() - {"action"})
        if arguments.state_key not in known:
            raise ValueError(
                f"`state_key` must be among the states {known} of {source.name!r}, got {arguments.state_key!r}."
            )
    count = arguments.num_validation_windows
    held_out = draw_windows(validation, pipeline, arguments, count, count, seed=1)
    if arguments.max_train_steps:
        data = draw_windows(training, pipeline, arguments, arguments.num_windows, arguments.num_rollouts, seed=0)
        size = data["recorded"][1].shape[-1]
        names = training.component_names(arguments.state_key) or [f"state {index}" for index in range(size)]
        model = train(data, names, arguments)
    else:
        model = ProprioceptionModel.from_pretrained(output).eval()

    unit = pipeline.frame_size[1] / (arguments.state_high[0] - arguments.state_low[0])
    report: dict[str, Any] = {name: errors(model, *part, unit) for name, part in held_out.items()}
    report["parameters"] = model.num_parameters()
    if arguments.max_train_steps:
        save_finished(output, model.save_pretrained)
    write_text(output / "metrics.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    print(f"wrote {output} after {(time.perf_counter() - began) / 60:.1f} min")


if __name__ == "__main__":
    run_script(main)
