"""Measure the drift of long rollouts, with the history kept in latents or decoded and encoded again.

    python examples/benchmark/drift.py --dataset data/pusht-test --num_episodes 16

The script prints the PSNR of each quarter of the rollout, averaged over episodes, for each chunk length. The baseline is
the repeated last history frame.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.data import open_dataset
from irasim_diffusers.training import run_script


@dataclass
class DriftArguments:
    dataset: str = field(metadata={"help": "held-out dataset"})
    model: str = field(default=str(embedded_checkpoint()), metadata={"help": "pipeline folder or Hub id"})
    num_episodes: int = field(
        default=16, metadata={"help": "maximum number of episodes; those that are too short are skipped"}
    )
    num_actions: int = field(default=56, metadata={"help": "number of actions per episode, divisible by 4"})
    chunk_lengths: list[int] = field(default_factory=lambda: [1], metadata={"help": "actions per predicted chunk"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32 or bfloat16"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})


def in_latents(pipeline: IRASimPipeline, frames: np.ndarray, actions: np.ndarray, chunk_length: int) -> np.ndarray:
    """Predict frames (n, H, W, 3); the history of each chunk is kept in latents."""
    generator = torch.Generator().manual_seed(0)
    video = pipeline.stream(frames, actions, chunk_length, generator=generator, output_type="np")
    return np.stack([np.asarray(frame) for frame in video])


def through_pixels(pipeline: IRASimPipeline, frames: np.ndarray, actions: np.ndarray, chunk_length: int) -> np.ndarray:
    """Predict frames (n, H, W, 3); the history of each chunk is decoded to 8 bits and encoded again."""
    generator, history, parts = torch.Generator().manual_seed(0), frames, []
    for start in range(0, len(actions), chunk_length):
        chunk = actions[start : start + chunk_length]
        video = pipeline.stream(history, chunk, chunk_length, generator=generator, output_type="np")
        predicted = np.stack([np.asarray(frame) for frame in video])
        parts.append(predicted)
        pictures = (predicted * 255).round().astype(np.uint8)
        history = np.concatenate([history, pictures])[-len(frames) :]
    return np.concatenate(parts)


def main() -> None:
    (arguments,) = HfArgumentParser(DriftArguments).parse_args_into_dataclasses()
    if arguments.num_actions % 4:
        raise ValueError(f"`num_actions` must be divisible by 4, got {arguments.num_actions}.")
    pipeline = IRASimPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).to(
        arguments.device
    )
    source = open_dataset(arguments.dataset, max_episodes=arguments.num_episodes)
    seen = pipeline.transformer.config.num_history_frames
    ways = {"latents": in_latents, "pixels": through_pixels}
    errors: dict[tuple[str, int], list[np.ndarray]] = {}
    for episode in tqdm(source, total=len(source), unit="episode"):
        if len(episode) < seen + arguments.num_actions:
            continue
        truth = episode.frames[seen : seen + arguments.num_actions] / 255.0
        actions = episode.actions[seen - 1 : seen - 1 + arguments.num_actions]

        def by_part(video: np.ndarray, truth: np.ndarray = truth) -> np.ndarray:
            parts = np.array_split(np.square(video - truth).mean(axis=(1, 2, 3)), 4)
            return np.array([-10 * np.log10(part.mean()) for part in parts])

        still = np.broadcast_to(episode.frames[seen - 1] / 255.0, truth.shape)
        errors.setdefault(("last history frame", 0), []).append(by_part(still))
        for length in arguments.chunk_lengths:
            for name, roll in ways.items():
                video = roll(pipeline, episode.frames[:seen], actions, length)
                errors.setdefault((name, length), []).append(by_part(video))
    if not errors:
        raise ValueError(
            f"`num_actions` must be smaller, got {arguments.num_actions}: each of the first {len(source)} episodes of "
            f"{arguments.dataset!r} has fewer than {seen + arguments.num_actions} frames."
        )
    quarter = arguments.num_actions // 4
    titles = " | ".join(f"actions {k * quarter + 1} to {(k + 1) * quarter}" for k in range(4))
    print(f"| history | actions per chunk | {titles} |\n|{'---|' * 6}")
    for (name, length), values in errors.items():
        figures = " | ".join(f"{value:.2f} dB" for value in np.mean(values, axis=0))
        print(f"| {name} | {length or ''} | {figures} |")


if __name__ == "__main__":
    run_script(main)
