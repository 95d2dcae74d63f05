"""How fast clips come: windows decoded from video, windows of cached latents, and what a training step waits for them.

    python examples/benchmark/data.py --dataset data/pusht-test --vae runs/pusht-vae --cache_dir runs/latents

One process, one row for each way; prints a table in Markdown.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.data import LatentClips, cache_latents, open_dataset
from irasim_diffusers.models import noise_process
from irasim_diffusers.training import diffusion_loss


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "any data set that train.py takes"})
    vae: str = field(metadata={"help": "autoencoder folder or Hub id"})
    cache_dir: str = field(metadata={"help": "where latents are kept"})
    cameras: list[str] = field(default_factory=list)
    model: str = field(default=str(embedded_checkpoint()), metadata={"help": "pipeline whose training step is timed"})
    batch_size: int = 16
    seconds: float = field(default=10.0, metadata={"help": "how long each way is measured"})


def rate(step: Callable[[], int], seconds: float) -> float:
    """Items a second of a step that returns how many it made; the first call is left out."""
    step()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += step()
    return done / (time.perf_counter() - start)


def main() -> None:
    (arguments,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = open_dataset(arguments.dataset, arguments.cameras or None)
    pipeline = IRASimPipeline.from_pretrained(arguments.model)
    config = pipeline.transformer.config
    numbers = np.random.default_rng(0).permutation(len(source))
    position = 0

    def decode() -> int:
        nonlocal position
        episode = source[int(numbers[position % len(numbers)])]
        position += 1
        return len(episode) // config.sample_frames

    clips = LatentClips(
        cache_latents(source, AutoencoderKL.from_pretrained(arguments.vae), arguments.cache_dir),
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

    decoded_rate, cached_rate = rate(decode, arguments.seconds), rate(cached, arguments.seconds)
    print(f"| windows of {config.sample_frames} frames | a second and core |\n|---|---|")
    print(f"| decoded from video, whole episodes | {decoded_rate:.0f} |")
    print(f"| of cached latents, batches of {arguments.batch_size} | {cached_rate:.0f} |")

    torch.set_num_threads(threads)
    process, model = noise_process(config), pipeline.transformer
    batch = next(iter(loader))
    history = config.num_history_frames

    def train() -> int:
        latents = batch["latents"]
        loss = diffusion_loss(
            model,
            process,
            latents,
            batch["actions"][:, history - 1 :],
            timesteps=torch.randint(1000, (len(latents),)),
            noise=torch.randn_like(latents[:, :, history:]),
        )
        loss.backward()
        model.zero_grad()
        return len(latents)

    trained_rate = rate(train, arguments.seconds)
    waiting = (1 / cached_rate) / (1 / cached_rate + 1 / trained_rate)
    print(f"| of a training step's time, waiting for cached latents | {100 * waiting:.1f} % |")


if __name__ == "__main__":
    main()
