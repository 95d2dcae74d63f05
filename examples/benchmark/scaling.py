r"""Train several model sizes on one dataset, and plot loss and PSNR against size and steps.

    python examples/benchmark/scaling.py --output_dir runs/scaling --sizes 2x2x48 4x3x64 6x6x64 \
        --dataset data/pusht-train --validation_dataset data/pusht-test --vae runs/pusht-vae \
        --max_train_steps 4000 --validation_steps 500

A size is a preset of the paper or, for the transformer, layers x heads x channels per head. The presets VDM and LVDM
require `--model unet`, which supports no other sizes. All other flags are passed to train.py. All
sizes are trained on the same windows, noise and timesteps in the same order. Completed sizes are skipped, and
interrupted ones resume. The output folder receives `scaling.json`, `scaling.md` and `scaling.png`. The script
requires `pip install ".[benchmark]"`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from example_runs import train_once, write_report
from transformers import HfArgumentParser

from irasim_diffusers import PRESETS, UNET_PRESETS, IRASimPipeline
from irasim_diffusers.files import temporary_path
from irasim_diffusers.training import exit_without_extra, run_script

try:
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ModuleNotFoundError as error:
    exit_without_extra(error, "benchmark")


@dataclass
class ScalingArguments:
    output_dir: Path = field(metadata={"help": "folder for the runs and the report"})
    sizes: list[str] = field(
        metadata={
            "help": "presets or, for the transformer, layers x heads x channels per head, for example 4x3x64; VDM and LVDM require "
            "--model unet"
        }
    )
    config_file: str | None = field(
        default=None, metadata={"help": "config file of `accelerate launch` (default: one process)"}
    )
    intervals: int = field(
        default=20, metadata={"help": "number of points of the loss curve; each is the mean over an interval of steps"}
    )


def size_flags(size: str) -> list[str]:
    """Return the flags of train.py for a size.

    Raises:
        ValueError: If the size is neither a preset nor three numbers.
    """
    if size in PRESETS or size in UNET_PRESETS:
        return ["--preset", size]
    numbers = size.split("x")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise ValueError(
            f"`sizes` must be presets ({', '.join((*PRESETS, *UNET_PRESETS))}) or sizes such as 4x3x64, got {size!r}."
        )
    names = ("--num_layers", "--num_attention_heads", "--attention_head_dim")
    return [part for flag in zip(names, numbers, strict=True) for part in flag]


def read_scalars(folder: Path, name: str) -> dict[int, float]:
    """Read scalars by step from the tensorboard logs; of repeated steps, the last value counts."""
    values: dict[int, float] = {}
    for path in sorted(folder.rglob("events.out.*")):
        log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if name in log.Tags()["scalars"]:
            values |= {event.step: event.value for event in log.Scalars(name)}
    return dict(sorted(values.items()))


def averaged(scalars: dict[int, float], intervals: int) -> list[list[float]]:
    """Average scalars over equal intervals of steps; return points (last step, mean)."""
    parts = np.array_split(np.array(list(scalars.items())), min(intervals, len(scalars)))
    return [[int(part[-1, 0]), float(part[:, 1].mean())] for part in parts]


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Plot loss and PSNR against steps, one line per size, and the final values against size."""
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
        axes[1].set(xlabel="parameters", ylabel=f"final {title}", xscale="log")
        axes[0].legend()
    return figure


def main() -> None:
    parser = HfArgumentParser(ScalingArguments, allow_abbrev=False)
    arguments, flags = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if not any(flag.split("=")[0] in ("--validation_dataset", "--validation-dataset") for flag in flags):
        raise ValueError("`validation_dataset` is required: the PSNR is measured on it. Add --validation_dataset.")
    chosen = {size: size_flags(size) for size in arguments.sizes}
    rows = []
    for size, own in chosen.items():
        folder = arguments.output_dir / size
        logged = ["--report_to", "tensorboard", "--logging_steps", 1, "--cache_dir", arguments.output_dir / "latents"]
        train_once(folder, *logged, *flags, *own, config_file=arguments.config_file)
        psnr = read_scalars(folder, "psnr")
        if not psnr:
            raise ValueError(
                f"{str(folder)!r} contains no PSNR: `validation_steps` must be at most the number of training steps."
            )
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
    run_script(main)
