"""Evaluate a Push-T world model on held-out seeds: reconstruction, prediction, action following.

    python examples/pusht/evaluate.py --model runs/pusht --dataset data/pusht-test --output runs/pusht/report.json

Metrics, most of them with bootstrap 95 % intervals over clips, episodes or histories:
- VAE reconstruction (not in pixel space): PSNR of held-out frames after encoding and decoding.
- Clip PSNR: PSNR of the predicted frames of clips in which the block moves. Baselines are the repeated last history frame and
  the prediction for the actions of another clip.
- Pose errors of pusher and block in the last predicted frame, and the fraction of frames in which both poses are found; over
  clips in which the block moves, and over these together with clips in which it rests.
- The same pose errors after rollouts of 60 expert actions. The baseline is that neither pusher nor block moves.
- Driving: 60 frames predicted from one frame with arrow keys that are held at random, at three speeds of the Space. Reported
  are the fraction of frames with exactly one pusher, the pose errors, and the PSNR of frames 1, 15, 30 and 60.
- Counterfactual identification: 8 action sequences that move the block and lead from one history to 8 different futures in
  the simulator. A prediction is correct if, of the 8 futures, the simulated future of the same actions is the closest.
The ground truth is always the simulator's frame before any compression. History frames are not scored.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import convolutional  # noqa: F401 - diffusers loads only classes of imported modules
import diffusers
import numpy as np
import torch
from collect import STATES, TASKS, check_states
from counterfactuals import WAYS, Task, check_reproduction, counterfactuals, identification_tasks, moved
from poses import one_pusher, pose_errors, read_poses, true_poses
from simulator import ARENA, PUSHER_RADIUS, Simulator
from tqdm import tqdm
from transformers import HfArgumentParser

import irasim_diffusers
from irasim_diffusers import ActionSpace, IRASimPipeline
from irasim_diffusers.commands import check_device, check_output, key_command, load_checked
from irasim_diffusers.data import LeRobotFolder
from irasim_diffusers.driving import Steering
from irasim_diffusers.evaluation import EvaluationCounter
from irasim_diffusers.files import write_text
from irasim_diffusers.metrics import bootstrap, identified, psnr
from irasim_diffusers.training import check_ranges, run_script

Predict: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (histories, actions) to frames, all (N, ...)
PREDICTED = 15  # predicted frames of a clip, as in the paper
ROLLOUT = 60  # actions of an expert rollout and of a driven episode
SPEEDS = (0.25, 0.5, 1.0)  # values of the speed slider in the Space
SPACE = ActionSpace(  # action space of the embedded model, so that all models are driven by the same actions
    names=("target_x", "target_y"),
    units=(None, None),
    low=(0.0, 0.0),
    high=(float(ARENA), float(ARENA)),
    scale=(1 / 32, 1 / 32),
    offset=(0.0, 0.0),
    kind="absolute",
)
DRIVING_SEED = 3_000_000  # first seed of the driven episodes, far from the seeds of the datasets
# errors if a pose is not found: pixels, pixels, degrees
WORST = {"pusher": 96.0, "block_centre": 96.0, "block_angle": 180.0}


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id"})
    dataset: str = field(metadata={"help": "held-out LeRobotDataset folder made by collect.py"})
    output: str | None = field(default=None, metadata={"help": "JSON report to write"})
    scheduler: str | None = field(default=None, metadata={"help": "diffusers scheduler class (default: the model's)"})
    timestep_spacing: str | None = field(
        default=None, metadata={"help": "timestep spacing of --scheduler; use trailing for few steps"}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "denoising steps (default: the model's)"})
    chunk_length: int | None = field(default=None, metadata={"help": "actions per chunk (default: the model's)"})
    num_history_frames: int = field(default=1, metadata={"help": "history frames for the model; in driving always 1"})
    num_seen_frames: int | None = field(
        default=None,
        metadata={
            "help": "frames of a clip before the scored frames (default: --num_history_frames); the model receives the last "
            "--num_history_frames of them, so models with different histories can be scored on the same frames"
        },
    )
    num_clips: int = field(
        default=200, metadata={"help": "maximum number of clips with a moving block, and with a resting block"}
    )
    num_rollouts: int = field(default=50, metadata={"help": "maximum number of expert rollouts; 0 skips them"})
    num_drives: int = field(default=32, metadata={"help": "driven episodes per speed; 0 skips them"})
    num_histories: int = field(default=50, metadata={"help": "maximum number of histories; 0 skips identification"})
    batch_size: int = field(default=8, metadata={"help": "clips or driven episodes predicted together"})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    first_seed: int = field(default=1_000_000, metadata={"help": "seed of the first episode of the dataset"})
    pusher_radius: float = field(
        default=PUSHER_RADIUS, metadata={"help": "pusher radius of the dataset in arena units"}
    )
    seed: int = field(default=0, metadata={"help": "random seed"})


def held_out_clips(
    dataset: LeRobotFolder, num_clips: int, length: int, history: int, moving: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select up to `num_clips` clips in which the block moves, or rests, spread over the episodes.

    Returns:
        Frames (N, length, 96, 96, 3), actions (N, length - history, 2) and last states (N, 5).

    Raises:
        ValueError: If there is no such clip.
    """
    per_episode = -(-num_clips // len(dataset))
    frames, actions, states = [], [], []
    for episode in dataset:
        block = episode.states["observation.environment_state"]
        starts = [
            start
            for start in range(0, len(episode) - length + 1, length)
            if moved(block[start + history - 1], block[start + length - 1]) == moving
        ]
        for start in starts[:per_episode]:
            last = start + length
            frames.append(episode.frames[start:last])
            actions.append(episode.actions[start + history - 1 : last - 1])
            states.append(np.concatenate([episode.states[key][last - 1] for key in STATES]))
            if len(frames) == num_clips:
                break
        if len(frames) == num_clips:
            break
    if not frames:
        raise ValueError(
            f"{dataset.name!r} has no clip of {length} frames in which the block {'moves' if moving else 'does not move'}."
        )
    return np.stack(frames), np.stack(actions), np.stack(states)


def pose_figures(
    frames: np.ndarray, states: np.ndarray, rng: np.random.Generator, pusher_radius: float
) -> dict[str, dict[str, float]]:
    """Return median pose errors of frames (N, 96, 96, 3), and the fraction with both poses found.

    All values have intervals. If a pose is not found, its errors are `WORST`.

    Args:
        frames: Frames, uint8 or floats in [0, 1].
        states: True states (N, 5) of pusher and block.
        rng: Generator of the bootstrap.
        pusher_radius: Radius of the pusher in arena units.
    """
    poses = read_poses(frames, pusher_radius)
    errors = pose_errors(poses, true_poses(states[:, :2], states[:, 2:]))
    return {
        name: bootstrap(np.nan_to_num(values, nan=WORST[name]), rng, np.median) for name, values in errors.items()
    } | {"found": bootstrap(poses.found.astype(float), rng)}


def print_poses(title: str, figures: dict[str, dict[str, float]]) -> None:
    """Print the result of `pose_figures` in one line."""
    text = ", ".join(f"{name} {figures[name]['median']:.2f}" for name in ("pusher", "block_centre", "block_angle"))
    print(f"{title}: {text}; found {figures['found']['mean']:.3f}", flush=True)


def expert_episodes(
    dataset: LeRobotFolder, num_rollouts: int, history: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return histories, actions (N, 60, 2), first and last states (N, 5) of expert episodes.

    The result is None if no expert episode is long enough, or `num_rollouts` is 0.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    start = 10  # after the pusher has started to move
    last = start + history - 1 + ROLLOUT
    for episode in dataset if num_rollouts else ():
        if episode.task == TASKS["expert"] and len(episode) > last:
            states = np.concatenate([*(episode.states[key] for key in STATES)], axis=1)
            actions = episode.actions[last - ROLLOUT : last]
            parts.append((episode.frames[start : start + history], actions, states[last - ROLLOUT], states[last]))
        if len(parts) == num_rollouts:
            break
    return tuple(np.stack(part) for part in zip(*parts, strict=True)) if parts else None  # type: ignore[return-value]


def held_keys(rng: np.random.Generator, steering: Steering, num_actions: int) -> np.ndarray:
    """Return actions (n, 2) of random arrow keys: none, one or two at a time, held for several steps."""
    keys = ("ArrowLeft", "ArrowRight", ""), ("ArrowUp", "ArrowDown", "")
    actions: list[np.ndarray] = []
    while len(actions) < num_actions:
        pressed = [str(rng.choice(options)) for options in keys]
        command = key_command(steering.action_space, pressed)
        actions += [steering.action(command) for _ in range(1 + rng.geometric(0.12))]
    return np.stack(actions[:num_actions])


def driven_episodes(number: int, speed: float, pusher_radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate episodes driven by random keys.

    Returns actions (N, 60, 2), frames (N, 61, 96, 96, 3) and states (N, 61, 5).
    """
    simulator = Simulator(pusher_radius)
    parts = []
    for seed in range(DRIVING_SEED, DRIVING_SEED + number):
        steering = Steering(SPACE, speed, start=simulator.reset(seed).agent)
        actions = held_keys(np.random.default_rng([seed, 4, round(100 * speed)]), steering, ROLLOUT)
        frames, states = simulator.replay(seed, actions)
        parts.append((actions, frames, np.stack([np.concatenate([state.agent, state.block]) for state in states])))
    return tuple(np.stack(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def driving_figures(
    frames: np.ndarray, truth: np.ndarray, states: np.ndarray, rng: np.random.Generator, pusher_radius: float
) -> dict[str, Any]:
    """Compare predicted frames (N, n, H, W, 3) of driven episodes with the simulator.

    Intervals are over the episodes. The fraction of frames with one pusher is over the frames of an episode in which the
    simulator shows exactly one. Pose errors are medians over the last 5 frames of an episode. A frame counts only if the pusher
    (or block) is found in the simulator's frame, because at the edges of the arena only a part of the pusher is visible. If it is
    not found in the predicted frame, the error is `WORST`. PSNR is averaged over all episodes.

    Returns:
        The metrics; empty if no frame of the simulator shows exactly one pusher.
    """
    shape = truth.shape[:2]
    visible = one_pusher(truth.reshape(-1, *truth.shape[2:]), pusher_radius).reshape(shape)
    if not visible.any():
        return {}
    shown = one_pusher(frames.reshape(-1, *frames.shape[2:]), pusher_radius).reshape(shape)
    shares = [(shown & visible)[k].sum() / visible[k].sum() for k in range(len(visible)) if visible[k].any()]
    late = slice(-5, None)
    poses = true_poses(*np.split(states[:, late].reshape(-1, 5), [2], axis=1))
    read, ideal = (
        pose_errors(read_poses(video[:, late].reshape(-1, *video.shape[2:]), pusher_radius), poses)
        for video in (frames, truth)
    )
    medians = {}
    for name, worst in WORST.items():
        values = np.where(np.isnan(ideal[name]), np.nan, np.nan_to_num(read[name], nan=worst)).reshape(len(frames), -1)
        medians[name] = np.nanmedian(values[~np.isnan(values).all(axis=1)], axis=1)
    horizon = {
        str(k): float(np.mean(psnr(frames[:, k - 1 : k], truth[:, k - 1 : k] / 255.0))) for k in (1, 15, 30, ROLLOUT)
    }
    return {
        "one_pusher": bootstrap(np.array(shares), rng),
        "one_pusher_frames": int(visible.sum()),
        "last_5_frames": {name: bootstrap(values, rng, np.median) for name, values in medians.items() if len(values)},
        "psnr_by_frame": horizon,
    }


@torch.no_grad()
def reconstruction(pipeline: IRASimPipeline, frames: np.ndarray) -> dict[str, float]:
    """Encode and decode clips (N, F, H, W, 3), uint8.

    Returns:
        `mean`, the PSNR in dB of the squared error averaged over all frames, and `n`, the number of frames.
    """
    pixels = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).flatten(0, 1)
    latents = pipeline.encode_history(pixels[:, None].float() / 127.5 - 1)
    decoded = (pipeline.decode_latents(latents)[:, :, 0].clamp(-1, 1) + 1) / 2
    error = (decoded.mul(255).round() / 255).cpu().numpy() - pixels.numpy() / 255.0
    return {"mean": float(-10 * np.log10((error**2).mean())), "n": len(pixels)}


def load_model(arguments: EvaluationArguments) -> tuple[IRASimPipeline, Predict]:
    """Load the pipeline to evaluate and its prediction function."""
    number = arguments.num_history_frames
    pipeline = load_checked(
        "--model",
        "a pipeline folder or Hub id",
        arguments.model,
        IRASimPipeline.from_pretrained,
        dtype=getattr(torch, arguments.dtype),
    )
    pipeline.to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.scheduler:
        changes = {"timestep_spacing": arguments.timestep_spacing} if arguments.timestep_spacing else {}
        pipeline = pipeline.with_scheduler(arguments.scheduler, **changes)

    def predict(frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return pipeline(
            frames[..., -number:, :, :, :],
            actions,
            num_inference_steps=arguments.num_inference_steps,
            chunk_length=arguments.chunk_length,
            generator=[torch.Generator().manual_seed(arguments.seed + k) for k in range(len(actions))],
            output_type="np",
        ).frames

    return pipeline, predict


def check_arguments(arguments: EvaluationArguments) -> None:
    """Check the arguments before anything is read.

    Raises:
        ValueError: If a value is out of range, arguments are inconsistent, or `output` cannot be written.
    """
    check_ranges(
        arguments,
        not_negative=("num_rollouts", "num_drives", "num_histories", "first_seed", "seed"),
        at_least_1=(
            *("num_clips", "batch_size", "num_history_frames", "num_seen_frames", "num_inference_steps"),
            "chunk_length",
        ),
        positive=("pusher_radius",),
        choices={"dtype": ("float32", "bfloat16")},
    )
    check_device(arguments.device)
    if arguments.timestep_spacing and not arguments.scheduler:
        raise ValueError("`timestep_spacing` requires `scheduler`: also pass --scheduler.")
    seen = arguments.num_seen_frames
    if seen is not None and seen < arguments.num_history_frames:
        raise ValueError(
            f"`num_seen_frames` must be at least `num_history_frames` ({arguments.num_history_frames}), got {seen}."
        )
    if arguments.output:
        check_output(Path(arguments.output), ".json")


@dataclass
class Evaluation:
    """A model and the held-out data; the methods compute groups of metrics and print the main ones."""

    arguments: EvaluationArguments
    dataset: LeRobotFolder
    pipeline: IRASimPipeline
    predict: Predict
    history: int  # frames of a clip before the scored frames
    tasks: list[Task]  # of the identification
    rng: np.random.Generator

    def predict_batches(self, frames: np.ndarray, actions: np.ndarray, name: str) -> np.ndarray:
        """Predict from the first `history` frames of clips (N, F, 96, 96, 3)."""
        size = self.arguments.batch_size
        bar = tqdm([slice(first, first + size) for first in range(0, len(frames), size)], desc=name, unit="batch")
        return np.concatenate([self.predict(frames[part, : self.history], actions[part]) for part in bar])

    def clips(self) -> dict[str, Any]:
        """Score clips in which the block moves, and the poses in their last frames.

        The poses are also scored in clips in which the block rests.
        """
        arguments, history, rng = self.arguments, self.history, self.rng
        (frames, actions, states), (still_frames, still_actions, still_states) = (
            held_out_clips(self.dataset, arguments.num_clips, history + PREDICTED, history, moving)
            for moving in (True, False)
        )
        report: dict[str, Any] = {}
        if self.pipeline.vae is not None:
            report["vae_psnr"] = reconstruction(self.pipeline, frames[:, ::5])
            print(f"PSNR of the VAE {report['vae_psnr']['mean']:.2f} dB", flush=True)
        truth = frames[:, history:] / 255.0
        start = time.perf_counter()
        with EvaluationCounter(self.pipeline.transformer) as evaluations:
            prediction = self.predict_batches(frames, actions, "clips")
            shuffled = self.predict_batches(frames, np.roll(actions, 1, axis=0), "shuffled actions")
            still = self.predict_batches(still_frames, still_actions, "still clips")
        seconds = time.perf_counter() - start
        sampled = len(prediction) + len(shuffled) + len(still)
        batches = sum(-(-len(part) // arguments.batch_size) for part in (prediction, shuffled, still))
        last = psnr(np.broadcast_to(frames[:, history - 1 : history] / 255.0, truth.shape), truth)
        own, other = psnr(prediction, truth), psnr(shuffled, truth)
        all_frames, all_states = np.concatenate([prediction, still]), np.concatenate([states, still_states])
        report |= {
            "clip_psnr": bootstrap(own, rng),
            "clip_psnr_last_frame": bootstrap(last, rng),
            "clip_psnr_shuffled_actions": bootstrap(other, rng),
            "gain_over_last_frame": bootstrap(own - last, rng),
            "gain_over_shuffled_actions": bootstrap(own - other, rng),
            "frames_per_second": {"mean": sampled * truth.shape[1] / seconds, "n": sampled},
            "network_evaluations_per_clip": {"mean": evaluations.count / batches, "n": batches},
            "last_frame": {
                "all": pose_figures(all_frames[:, -1], all_states, rng, arguments.pusher_radius),
                "moving": pose_figures(prediction[:, -1], states, rng, arguments.pusher_radius),
            },
        }
        for group, figures in report["last_frame"].items():
            print_poses(f"last frame, {group}", figures)
        for name in ("clip_psnr", "clip_psnr_last_frame", "clip_psnr_shuffled_actions", "gain_over_last_frame"):
            mean, low, high = (report[name][key] for key in ("mean", "low", "high"))
            print(f"{name} {mean:.2f} dB [{low:.2f}, {high:.2f}]", flush=True)
        return report

    def expert_rollouts(self) -> dict[str, Any]:
        """Score the poses after expert actions; the baseline is that nothing moves.

        The result is empty if no expert episode is long enough, or `num_rollouts` is 0.
        """
        arguments, rng = self.arguments, self.rng
        expert = expert_episodes(self.dataset, arguments.num_rollouts, self.history)
        if expert is None:
            return {}
        histories, actions, before, after = expert
        ends = [
            self.predict(histories[k : k + 1], actions[k : k + 1])[0, -1] for k in tqdm(range(len(after)), "rollouts")
        ]
        stays = pose_errors(true_poses(before[:, :2], before[:, 2:]), true_poses(after[:, :2], after[:, 2:]))
        figures = pose_figures(np.stack(ends), after, rng, arguments.pusher_radius) | {
            f"{name}_if_nothing_moved": bootstrap(values, rng, np.median) for name, values in stays.items()
        }
        print_poses(f"end of {ROLLOUT} expert actions", figures)
        return {"expert_rollout": figures}

    def drives(self) -> dict[str, Any]:
        """Score episodes driven by random keys at each speed; the result is empty if no frame can be scored."""
        arguments, report = self.arguments, {}
        for speed in SPEEDS if arguments.num_drives else ():
            actions, frames, states = driven_episodes(arguments.num_drives, speed, arguments.pusher_radius)
            parts = [slice(k, k + arguments.batch_size) for k in range(0, len(actions), arguments.batch_size)]
            bar = tqdm(parts, desc=f"driving at {speed:g}", unit="batch")
            predicted = np.concatenate([self.predict(frames[part, :1], actions[part]) for part in bar])
            figures = driving_figures(predicted, frames[:, 1:], states[:, 1:], self.rng, arguments.pusher_radius)
            if not figures:
                print(
                    f"driving at {speed:g}: omitted, because no frame of the simulator shows exactly one pusher",
                    flush=True,
                )
                continue
            report[f"{speed:g}"] = figures
            errors = ", ".join(f"{name} {values['median']:.2f}" for name, values in figures["last_5_frames"].items())
            print(
                f"driving at {speed:g}: exactly one pusher in {100 * figures['one_pusher']['mean']:.1f} % of frames; "
                f"last 5 frames: {errors}",
                flush=True,
            )
        return {"driving": report} if report else {}

    def identification(self) -> dict[str, Any]:
        """Measure how often, of 8 simulated futures, that of the same actions is closest to the prediction.

        The result is empty if no history has 8 different futures with a moving block, or `num_histories` is 0.
        """
        if (number := self.arguments.num_histories) == 0:
            return {}
        right: list[np.ndarray] = []
        workers = min(os.cpu_count() or 1, number)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            bar = tqdm(total=number, desc="counterfactuals", unit="history")
            for found in pool.map(counterfactuals, self.tasks):
                if found is None:
                    continue
                seen, sequences, futures = found
                prediction = self.predict(seen, sequences)
                error = np.square(prediction[:, None] - futures[None] / 255.0).mean(axis=(2, 3, 4, 5))  # (8, 8)
                right.append(identified(error, np.arange(WAYS)))
                bar.update()
                if len(right) == number:
                    break
            pool.shutdown(cancel_futures=True)
        if not right:
            print(
                f"identification: omitted, because no history has {WAYS} different futures in which the block moves",
                flush=True,
            )
            return {}
        rates = np.stack(right).mean(1)  # per history, because its 8 predictions are not independent
        figures = bootstrap(rates, self.rng)
        print(f"identification {figures['mean']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]")
        return {"identification": figures | {"ways": WAYS, "predictions": WAYS * len(rates)}}

    def setting(self) -> dict[str, Any]:
        """Describe the model, the sampler, the command and the versions."""
        return asdict(self.arguments) | {
            "scheduler": type(self.pipeline.scheduler).__name__,
            "command": " ".join(["python", *sys.argv]),
            "versions": {
                "irasim_diffusers": irasim_diffusers.__version__,
                "diffusers": diffusers.__version__,
                "torch": torch.__version__,
            },
        }


def main() -> None:
    (arguments,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    history = arguments.num_history_frames if arguments.num_seen_frames is None else arguments.num_seen_frames
    dataset = LeRobotFolder(Path(arguments.dataset))
    check_states(dataset)
    rng = np.random.default_rng(arguments.seed)
    number, seed, radius = arguments.num_histories, arguments.first_seed, arguments.pusher_radius
    tasks = identification_tasks(dataset, number, history + PREDICTED, history, seed, radius) if number else []
    if tasks:
        check_reproduction(tasks[0])
    evaluation = Evaluation(arguments, dataset, *load_model(arguments), history, tasks, rng)
    report: dict[str, Any] = {}
    for part in (evaluation.clips, evaluation.expert_rollouts, evaluation.drives, evaluation.identification):
        report |= part()
        if arguments.output:  # after every part, because the next one can take hours
            content = report | {"setting": evaluation.setting()}
            write_text(Path(arguments.output), json.dumps(content, indent=2))


if __name__ == "__main__":
    run_script(main)
