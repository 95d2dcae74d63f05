"""Evaluate a Push-T world model on held-out seeds: reconstruction, prediction, obedience to actions.

    python examples/pusht/evaluate.py --model runs/pusht --dataset data/pusht-test --output runs/pusht/report.json

Figures, with bootstrap 95 % intervals over clips:
- VAE reconstruction, PSNR of held-out frames;
- clip PSNR over the predicted frames of clips in which the block moves, beside repeating the last seen frame and beside
  the prediction under the actions of another clip;
- counterfactual identification: from one history, 8 action sequences that all move the block and whose futures differ,
  each replayed in the simulator. A prediction counts as right when, of the 8 true futures, its own is the nearest.
Truth is always the simulator's raw frame; the observed history is never scored.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
from simulator import Simulator, State, push_about, push_at
from tqdm import tqdm
from transformers import HfArgumentParser

import irasim_diffusers
from irasim_diffusers import IRASimPipeline
from irasim_diffusers.data import LeRobotFolder
from irasim_diffusers.metrics import psnr

WAYS = 8
MOVED = 5.0  # arena units or hundredths of a radian by which a block moves in a 'moving' clip; about a pixel
DISTINCT = 30.0  # PSNR in dB below which two true futures count as different


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id"})
    dataset: str = field(metadata={"help": "held-out LeRobotDataset folder made by collect.py"})
    output: str | None = field(default=None, metadata={"help": "JSON report to write"})
    scheduler: str | None = field(
        default=None, metadata={"help": "scheduler class of diffusers (default: the model's)"}
    )
    num_inference_steps: int = 50
    num_history_frames: int = field(default=1, metadata={"help": "observed frames given to the model"})
    num_clips: int = field(default=200, metadata={"help": "clips in which the block moves"})
    num_histories: int = field(default=50, metadata={"help": "histories of the identification; 0 leaves it out"})
    batch_size: int = 8
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    device: str = "cpu"
    first_seed: int = field(default=1_000_000, metadata={"help": "first seed of the data set"})
    seed: int = 0


def moved(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the block's pose (x, y, angle) changed by more than about a pixel."""
    return bool(np.linalg.norm(after[:2] - before[:2]) > MOVED or abs(after[2] - before[2]) > MOVED / 100)


def bootstrap(values: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Mean with a 95 % interval."""
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def moving_clips(
    dataset: LeRobotFolder, num_clips: int, length: int, history: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames and actions of clips in which the block moves, spread evenly over the episodes."""
    per_episode = -(-num_clips // len(dataset))
    found = 0
    for episode in dataset.episodes():
        block = episode.states["observation.environment_state"]
        starts = [
            s for s in range(0, len(episode) - length, length) if moved(block[s + history - 1], block[s + length - 1])
        ]
        for start in starts[:per_episode]:
            last = start + length
            yield episode.frames[start:last], episode.actions[start + history - 1 : last - 1]
            found += 1
            if found == num_clips:
                return


def counterfactuals(task: tuple[int, np.ndarray, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Histories, actions (8, n, 2) and true frames (8, n, 96, 96, 3) of one seed, or None where 8 are not found."""
    seed, recorded, start, num_actions, history = task
    simulator = Simulator()
    _, states = simulator.replay(seed, recorded[:start], first_frame=start)
    rng = np.random.default_rng([seed, 2])
    sequences: list[np.ndarray] = []
    futures: list[np.ndarray] = []
    seen = None
    for attempt in range(60):
        actions = recorded[start : start + num_actions] if attempt == 0 else candidate(rng, states[-1], num_actions)
        frames, outcome = simulator.replay(seed, np.concatenate([recorded[:start], actions]), start + 1 - history)
        if not moved(outcome[start].block, outcome[-1].block):
            continue
        seen, future = frames[:history], frames[history:]
        if any(psnr(future / 255.0, other / 255.0) > DISTINCT for other in futures):
            continue
        sequences.append(actions)
        futures.append(future)
        if len(futures) == WAYS:
            return seen, np.stack(sequences), np.stack(futures)
    return None


def candidate(rng: np.random.Generator, state: State, num_actions: int) -> np.ndarray:
    """A random action sequence (n, 2) that is likely to touch the block; the state is not fed back."""
    pusher = push_at(rng, state) if rng.random() < 0.8 else push_about(rng, state)
    return np.stack([next(pusher), *(pusher.send(state) for _ in range(num_actions - 1))])


def identification_tasks(
    dataset: LeRobotFolder, num_histories: int, length: int, history: int, first_seed: int
) -> list[tuple[int, np.ndarray, int, int, int]]:
    """One history an episode, where the recorded block is about to move."""
    tasks = []
    for number in range(len(dataset)):
        vectors = dataset.vectors(number)
        block = vectors["observation.environment_state"]
        starts = [k for k in range(20, len(block) - length, 5) if moved(block[k], block[k + 5])]
        if starts:
            tasks.append((first_seed + number, vectors["action"], starts[0], length - history, history))
    return tasks[: 2 * num_histories]  # some have no 8 distinct futures


def main() -> None:
    (arguments,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()
    rng = np.random.default_rng(arguments.seed)
    pipeline = IRASimPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    pipeline.to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.scheduler:
        pipeline.scheduler = getattr(diffusers, arguments.scheduler).from_config(pipeline.scheduler.config)
    dataset = LeRobotFolder(Path(arguments.dataset))
    length = pipeline.transformer.config.sample_frames
    evaluations = 0

    def count(*_: object) -> None:
        nonlocal evaluations
        evaluations += 1

    pipeline.transformer.register_forward_hook(count)

    def predict(frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
        generators = [torch.Generator().manual_seed(arguments.seed + k) for k in range(len(actions))]
        return pipeline(
            frames,
            actions,
            num_inference_steps=arguments.num_inference_steps,
            generator=generators,
            output_type="np",
        ).frames

    history = arguments.num_history_frames
    clips = list(moving_clips(dataset, arguments.num_clips, length, history))
    frames, actions = (np.stack(part) for part in zip(*clips, strict=True))
    pixels = torch.from_numpy(frames[:, ::5]).permute(0, 1, 4, 2, 3).flatten(0, 1)
    with torch.no_grad():
        latents = pipeline.encode_history(pixels[:, None].float() / 127.5 - 1)
        decoded = (pipeline.decode_latents(latents)[:, :, 0].clamp(-1, 1) + 1) / 2
    vae_error = ((decoded.mul(255).round() / 255).cpu().numpy() - pixels.numpy() / 255.0) ** 2
    report = {"vae_psnr": {"mean": float(-10 * np.log10(vae_error.mean())), "n": len(pixels)}}
    print(f"VAE {report['vae_psnr']['mean']:.2f} dB", flush=True)

    truth = frames[:, history:] / 255.0
    start, predicted, shuffled = time.perf_counter(), [], []
    others = np.roll(actions, 1, axis=0)
    for first in tqdm(range(0, len(frames), arguments.batch_size), desc="moving clips", unit="batch"):
        part = slice(first, first + arguments.batch_size)
        predicted.append(predict(frames[part, :history], actions[part]))
        shuffled.append(predict(frames[part, :history], others[part]))
    seconds = time.perf_counter() - start
    prediction = np.concatenate(predicted)
    last = psnr(np.broadcast_to(frames[:, history - 1 : history] / 255.0, truth.shape), truth)
    own, other = psnr(prediction, truth), psnr(np.concatenate(shuffled), truth)
    report |= {
        "clip_psnr": bootstrap(own, rng),
        "clip_psnr_last_frame": bootstrap(last, rng),
        "clip_psnr_shuffled_actions": bootstrap(other, rng),
        "gain_over_last_frame": bootstrap(own - last, rng),
        "gain_over_shuffled_actions": bootstrap(own - other, rng),
        "frames_per_second": {"mean": 2 * truth.shape[0] * truth.shape[1] / seconds, "n": 2 * len(truth)},
        "network_evaluations_per_window": {
            "mean": evaluations / (2 * len(predicted)),
            "n": 2 * len(predicted),
        },
    }
    for name in ("clip_psnr", "clip_psnr_last_frame", "clip_psnr_shuffled_actions", "gain_over_last_frame"):
        print(
            f"{name} {report[name]['mean']:.2f} dB [{report[name]['low']:.2f}, {report[name]['high']:.2f}]", flush=True
        )

    if arguments.num_histories:
        tasks = identification_tasks(dataset, arguments.num_histories, length, history, arguments.first_seed)
        right: list[np.ndarray] = []
        with multiprocessing.get_context("spawn").Pool() as pool:
            bar = tqdm(total=arguments.num_histories, desc="counterfactuals", unit="history")
            for found in pool.imap(counterfactuals, tasks):
                if found is None:
                    continue
                seen, sequences, futures = found
                prediction = predict(seen, sequences)
                error = np.square(prediction[:, None] - futures[None] / 255.0).mean(axis=(2, 3, 4, 5))  # (8, 8)
                right.append(error.argmin(1) == np.arange(WAYS))
                bar.update()
                if len(right) == arguments.num_histories:
                    break
            pool.terminate()
        rates = np.stack(right).mean(1)  # by history: the 8 predictions of one are not independent
        report["identification"] = bootstrap(rates, rng) | {"ways": WAYS, "predictions": WAYS * len(rates)}
        found_rate = report["identification"]
        print(f"identification {found_rate['mean']:.3f} [{found_rate['low']:.3f}, {found_rate['high']:.3f}]")

    report["setting"] = asdict(arguments) | {
        "scheduler": type(pipeline.scheduler).__name__,
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "irasim_diffusers": irasim_diffusers.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
