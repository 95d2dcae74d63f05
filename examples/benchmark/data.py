"""Measure data loading from video and from cached latents, and its share of a training step.

    python examples/benchmark/data.py --dataset data/pusht-test --model runs/robot --vae runs/vae

The script runs in one process and prints a Markdown table. Rates are per second of CPU time, because video decoders
use all cores. Without `--vae`, only video decoding is measured, which works for any dataset. With it, the model must be
in the latent space of this autoencoder, and its actions must be those of the dataset.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.data import EpisodeSource, LatentClips, cache_latents, open_dataset
from irasim_diffusers.models import noise_process
from irasim_diffusers.training import diffusion_loss, load_autoencoder, run_script


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "any dataset that train.py supports"})
    vae: str | None = field(default=None, metadata={"help": "autoencoder folder or Hub id"})
    cache_dir: str = field(default="runs/latents", metadata={"help": "folder of the latent cache"})
    num_episodes: int | None = field(default=None, metadata={"help": "number of episodes to use (default: all)"})
    cameras: list[str] = field(default_factory=list, metadata={"help": "cameras to use (default: the only camera)"})
    model: str = field(
        default=str(embedded_checkpoint()),
        metadata={"help": "pipeline folder or Hub id; determines the window length and the training step"},
    )
    batch_size: int = field(default=16, metadata={"help": "batch size"})
    seconds: float = field(default=10.0, metadata={"help": "duration of each measurement in seconds"})


def rate(step: Callable[[], int], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the number of items that `step` processes per second.

    `step` returns the number of items of a call. The first call is not counted.
    """
    step()
    done, start = 0, clock()
    while clock() - start < seconds:
        done += step()
    return done / (clock() - start)


def measure_decoding(source: EpisodeSource, length: int, seconds: float) -> None:
    """Measure decoding of random windows and, for comparison, of complete episodes.

    Raises:
        ValueError: If all episodes are shorter than a window.
    """
    lengths = [len(source.vectors(number)["action"]) for number in range(len(source))]
    long_enough = [number for number, frames in enumerate(lengths) if frames >= length]
    if not long_enough:
        raise ValueError(
            f"{source.name!r} must have an episode of at least {length} frames, got at most {max(lengths)}."
        )
    rng = np.random.default_rng(0)

    def window() -> int:
        number = int(rng.choice(long_enough))
        source.window(number, int(rng.integers(lengths[number] - length + 1)), length)
        return 1

    def episode() -> int:
        return len(source[int(rng.choice(long_enough))]) // length

    whole = rate(episode, seconds, time.process_time)
    alone = np.mean([lengths[number] // length for number in long_enough])
    print(f"| windows of {length} frames | per second of CPU time |\n|---|---|")
    print(f"| random windows, decoded from the preceding keyframe | {rate(window, seconds, time.process_time):.0f} |")
    print(f"| one window of each completely decoded episode | {whole / alone:.0f} |")
    print(f"| all windows of completely decoded episodes | {whole:.0f} |")


def main() -> None:
    (arguments,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = open_dataset(arguments.dataset, arguments.cameras or None, max_episodes=arguments.num_episodes)
    pipeline = IRASimPipeline.from_pretrained(arguments.model)
    config = pipeline.transformer.config
    measure_decoding(source, config.sample_frames, arguments.seconds)
    if arguments.vae is None:
        return
    clips = LatentClips(
        cache_latents(source, load_autoencoder(arguments.vae, "vae"), arguments.cache_dir),
        config.sample_frames,
        skip_short=True,
    )
    loader = DataLoader(clips, batch_size=arguments.batch_size, shuffle=True, drop_last=True)
    batches = iter(loader)

    def cached() -> int:
        nonlocal batches
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        return len(batch["latents"])

    cached_rate = rate(cached, arguments.seconds, time.process_time)
    print(f"| cached latents, batch size {arguments.batch_size} | {cached_rate:.0f} |")

    torch.set_num_threads(threads)
    process, model = noise_process(config), pipeline.transformer
    batch = next(iter(loader))
    history = config.num_history_frames

    def train() -> int:
        latents = batch["latents"]
        losses = diffusion_loss(
            model,
            process,
            latents,
            batch["actions"][:, history - 1 :],
            timesteps=torch.randint(1000, (len(latents),)),
            noise=torch.randn_like(latents[:, :, history:]),
        )
        losses["loss"].backward()
        model.zero_grad()
        return len(latents)

    trained_rate = rate(train, arguments.seconds)
    waiting = (1 / cached_rate) / (1 / cached_rate + 1 / trained_rate)
    print(f"| share of a training step spent loading cached latents | {100 * waiting:.1f} % |")


if __name__ == "__main__":
    run_script(main)
