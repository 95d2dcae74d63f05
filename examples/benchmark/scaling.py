r"""Train several sizes on one data set, and plot loss and PSNR against size and steps.

    python examples/benchmark/scaling.py --output_dir runs/scaling --sizes 2x2x48 4x3x64 6x6x64 \
        --dataset data/pusht-train --validation_dataset data/pusht-test --vae runs/pusht-vae \
        --max_train_steps 4000 --validation_steps 500

A size is a preset of the paper or `layers x heads x channels of a head`; all other flags go to train.py as they are. Every
size sees the same windows, noise and timesteps in the same order. A size that is done is not trained again, one that was
stopped goes on. Written are `scaling.json`, `scaling.md` and `scaling.png`. Needs `pip install .[benchmark]`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from runs import train_once, write_report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import HfArgumentParser

from irasim_diffusers import PRESETS, UNET_PRESETS, IRASimPipeline
from irasim_diffusers.files import temporary_path


@dataclass
class ScalingArguments:
    output_dir: Path = field(metadata={"help": "a folder for each size, and the report"})
    sizes: list[str] = field(metadata={"help": "presets, or layers x heads x channels of a head, like 4x3x64"})
    config_file: str | None = field(
        default=None, metadata={"help": "config of `accelerate launch` (default: one process)"}
    )
    intervals: int = field(default=20, metadata={"help": "points of a loss curve, each the mean over its steps"})


def size_flags(size: str) -> list[str]:
    """What tells train.py of a size.

    Raises:
        ValueError: If it is neither a preset nor three numbers.
    """
    if size in PRESETS or size in UNET_PRESETS:
        return ["--preset", size]
    numbers = size.split("x")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"`sizes` must be presets ({', '.join(PRESETS)}) or like 4x3x64, got {size!r}.")
    names = ("--num_layers", "--num_attention_heads", "--attention_head_dim")
    return [part for flag in zip(names, numbers, strict=True) for part in flag]


def read_scalars(folder: Path, name: str) -> dict[int, float]:
    """What a run told tensorboard by step; where a step was done again after a stop, the later value counts."""
    values: dict[int, float] = {}
    for path in sorted(folder.rglob("events.out.*")):
        log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if name in log.Tags()["scalars"]:
            values |= {event.step: event.value for event in log.Scalars(name)}
    return dict(sorted(values.items()))


def averaged(scalars: dict[int, float], intervals: int) -> list[list[float]]:
    """Points (last step, mean) of as many parts of the run, of equal length."""
    parts = np.array_split(np.array(list(scalars.items())), min(intervals, len(scalars)))
    return [[int(part[-1, 0]), float(part[:, 1].mean())] for part in parts]


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Loss and PSNR against steps, a line for each size, and their last values against size."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(2, 2), (("loss", "training loss"), ("psnr", "PSNR, dB")), strict=True
    ):
        for row in rows:
            axes[0].plot(
                *zip(*row[name], strict=True), marker=".", label=f"{row['size']}, {row['parameters'] / 1e6:.2f} M"
            )
        axes[1].plot([row["parameters"] for row in rows], [row[name][-1][1] for row in rows], marker="o")
        axes[0].set(xlabel="steps", ylabel=title)
        axes[1].set(xlabel="parameters", ylabel=f"{title}, at the end", xscale="log")
        axes[0].legend()
    return figure


def main() -> None:
    parser = HfArgumentParser(ScalingArguments, allow_abbrev=False)
    arguments, flags = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if "--validation_dataset" not in flags:
        raise ValueError("`validation_dataset` must be given among the flags of train.py: PSNR is measured on it.")
    chosen = {size: size_flags(size) for size in arguments.sizes}
    rows = []
    for size, own in chosen.items():
        folder = arguments.output_dir / size
        logged = ["--report_to", "tensorboard", "--logging_steps", 1, "--cache_dir", arguments.output_dir / "latents"]
        train_once(folder, *logged, *flags, *own, config_file=arguments.config_file)
        psnr = read_scalars(folder, "psnr")
        if not psnr:
            raise ValueError(f"{str(folder)!r} has no PSNR: let `validation_steps` be at most `max_train_steps`.")
        rows.append(
            {
                "size": size,
                "parameters": IRASimPipeline.from_pretrained(folder).transformer.num_parameters(),
                "loss": averaged(read_scalars(folder, "loss"), arguments.intervals),
                "psnr": [list(point) for point in psnr.items()],
            }
        )
    rows.sort(key=lambda row: row["parameters"])
    table = "| size | parameters | steps | training loss | PSNR, dB |\n|---|---|---|---|---|\n"
    for row in rows:
        (steps, loss), (validated, psnr) = row["loss"][-1], row["psnr"][-1]
        table += (
            f"| {row['size']} | {row['parameters']:,} | {steps:,} | {loss:.4f} | {psnr:.2f}, step {validated:,} |\n"
        )
    write_report(arguments.output_dir, "scaling", {"rows": rows, "flags": flags}, table)
    with temporary_path(arguments.output_dir / "scaling.png") as partial:
        plot(rows).savefig(partial, format="png", dpi=150)


if __name__ == "__main__":
    main()
