r"""Compare Frame-Ada, Video-Ada and LVDM conditioning on Push-T at equal training time.

    python examples/benchmark/conditioning.py --output_dir runs/conditioning --max_train_minutes 30 --seeds 0 1 2 \
        --test_dataset data/pusht-test --dataset data/pusht-train --vae runs/pusht-vae \
        --action_space absolute --action_offset 256 --action_scale 0.03125 --learning_rate 1e-3 \
        --attention_backend _native_math

All models are trained on the same data for the same wall-clock time and have similar numbers of parameters: the
default sizes of train.py, unless `--transformer_flags`, `--video_ada_flags` or `--unet_flags` change them. All other
flags are passed to train.py for every model. Each model is trained once per seed and number of history frames, and
evaluated with pusht/evaluate.py on the same clips. The models of a seed are trained alternately in `--rounds` parts,
so that changes in machine speed affect all of them. Completed runs are skipped. The output folder receives
`conditioning.json` and `conditioning.md`. A pose that is not found counts with an error of 96 px.

Confidence intervals use Student's t distribution over seeds; differences are paired by seed. With one seed, and in the
table of single runs, intervals are those of evaluate.py, over clips or, for the identification, over histories. With one
seed, differences have no interval. With several numbers of history frames, all models are scored on the frames after the
longest history.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from example_runs import run_once, train_once, write_report
from scipy import stats
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.training import check_ranges, list_checkpoints, run_script, seconds_trained, step_of

MODELS = {
    "Frame-Ada": ["--conditioning", "frame"],
    "Video-Ada": ["--conditioning", "video"],
    "LVDM": ["--model", "unet"],
}
FIGURES = {
    "clip_psnr": "PSNR, dB",
    "gain_over_last_frame": "gain over last frame, dB",
    "gain_over_shuffled_actions": "gain over shuffled actions, dB",
    "last_frame/moving/found": "both poses found",
    "last_frame/moving/pusher": "pusher error, px",
    "last_frame/moving/block_centre": "block error, px",
    "identification": "8-way identification",
}
"""Metrics of evaluate.py's report and their column titles."""


@dataclass
class ConditioningArguments:
    output_dir: Path = field(metadata={"help": "folder for the runs and the report"})
    test_dataset: str = field(metadata={"help": "held-out dataset made by collect.py"})
    max_train_minutes: float = field(metadata={"help": "wall-clock time of each training run in minutes"})
    rounds: int = field(
        default=1, metadata={"help": "number of parts into which the training time is divided; the models alternate"}
    )
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "models to compare"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "training seeds"})
    num_history_frames: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "numbers of history frames; all are scored on the same frames"},
    )
    transformer_flags: str = field(
        default="--patch_size 2",
        metadata={
            "help": 'flags of train.py for both transformers, for example `--transformer_flags="--num_layers 2"`'
        },
    )
    video_ada_flags: str = field(default="", metadata={"help": "additional flags of train.py for Video-Ada"})
    unet_flags: str = field(default="", metadata={"help": "flags of train.py for the U-Net"})
    config_file: str | None = field(
        default=None, metadata={"help": "config file of `accelerate launch` (default: one process)"}
    )
    first_seed: int = field(default=1_000_000, metadata={"help": "seed of the first episode of the test set"})
    pusher_radius: float | None = field(
        default=None, metadata={"help": "pusher radius of the test set in arena units"}
    )
    num_clips: int = field(
        default=200, metadata={"help": "number of clips; see evaluate.py for this and the following options"}
    )
    num_histories: int = field(default=50, metadata={"help": "number of histories for the identification"})
    scheduler: str | None = field(default=None, metadata={"help": "diffusers scheduler class (default: the model's)"})
    timestep_spacing: str | None = field(
        default=None, metadata={"help": "timestep spacing of --scheduler (default: the model's)"}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "denoising steps (default: the model's)"})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})


def read_figures(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Read the metrics of a report, each with `value`, `low` and `high`."""
    figures = {}
    for name in FIGURES:
        entry: Any = report
        for part in name.split("/"):
            entry = entry.get(part, {})
        if entry:
            figures[name] = {
                "value": entry.get("mean", entry.get("median")),
                "low": entry["low"],
                "high": entry["high"],
            }
    return figures


def over_seeds(values: list[float]) -> dict[str, float]:
    """Return the mean over seeds with a 95 % interval (Student's t); with one seed, without interval."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return {"value": mean}
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {"value": mean, "low": mean - half, "high": mean + half}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the runs of a model as means over seeds."""
    numbers = ("parameters", "steps", "evaluations")
    row: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in numbers}
    if len(runs) == 1:
        return row | runs[0]["figures"]
    return row | {name: over_seeds([run["figures"][name]["value"] for run in runs]) for name in runs[0]["figures"]}


def gains(first: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of the first model minus those of the other, paired by seed."""
    pairs = [(one["figures"], two["figures"]) for one, two in zip(first, other, strict=True)]
    return {name: over_seeds([one[name]["value"] - two[name]["value"] for one, two in pairs]) for name in pairs[0][0]}


def compare(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Summarize each model and number of history frames, and compute paired differences.

    Differences are computed between the first model and each other model with the same number of history frames, and, for each
    model, between each further number of history frames and the first one.

    Returns:
        Rows of the models and rows of the differences.
    """
    groups: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        groups.setdefault(run["num_history_frames"], {}).setdefault(run["model"], []).append(run)
    rows, differences = [], []
    for history, models in groups.items():
        (first, best), *others = models.items()
        common = {"num_history_frames": history, "seeds": len(best)}
        rows += [{"model": model} | common | summarise(group) for model, group in models.items()]
        differences += [{"model": f"{first} - {model}"} | common | gains(best, group) for model, group in others]
    (base, compared), *more = groups.items()
    differences += [
        {"model": model, "num_history_frames": f"{history} - {base}", "seeds": len(group)}
        | gains(group, compared[model])
        for history, models in more
        for model, group in models.items()
    ]
    return rows, differences


def cell(value: dict[str, float] | None) -> str:
    """Format a metric with its interval."""
    if value is None:
        return ""
    interval = f" [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value else ""
    return f"{value['value']:.3f}{interval}"


def table(leading: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """Format rows as a Markdown table of the `leading` entries and the metrics."""
    titles = [name.replace("num_history_frames", "history") for name in leading] + list(FIGURES.values())
    text = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n"
    for row in rows:
        cells = [value if isinstance(value := row[name], str) else f"{value:,.0f}" for name in leading]
        text += f"| {' | '.join(cells + [cell(row.get(name)) for name in FIGURES])} |\n"
    return text


def tables(rows: list[dict[str, Any]], differences: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Format the tables of models, differences and single runs."""
    parts = [table(("model", "num_history_frames", "seeds", "parameters", "steps", "evaluations"), rows)]
    if differences:
        parts.append(table(("model", "num_history_frames", "seeds"), differences))
    single = [run | run["figures"] for run in runs]
    parts.append(table(("model", "num_history_frames", "seed", "steps"), single))
    return "\n".join(parts)


def model_flags(arguments: ConditioningArguments, common: list[str]) -> dict[str, list[str]]:
    """Return the flags of train.py for each model; the last one of repeated flags counts."""
    own = {
        "Frame-Ada": arguments.transformer_flags,
        "Video-Ada": f"{arguments.transformer_flags} {arguments.video_ada_flags}",
        "LVDM": arguments.unet_flags,
    }
    return {model: common + MODELS[model] + shlex.split(own[model]) for model in arguments.models}


def turns(models: list[str], rounds: int, minutes: float) -> list[tuple[str, float]]:
    """Return the training order as pairs of a model and its total training time in minutes."""
    return [(model, minutes * (part / rounds)) for part in range(1, rounds + 1) for model in models]


def train_in_turn(
    arguments: ConditioningArguments, flags: dict[str, list[str]], history: int, seed: int
) -> dict[str, Path]:
    """Train the models of one seed and number of history frames alternately; return their folders."""
    folders = {model: arguments.output_dir / f"{model}-history-{history}-seed-{seed}" for model in flags}
    for model, minutes in turns(list(flags), arguments.rounds, arguments.max_train_minutes):
        found = list_checkpoints(folders[model])
        if minutes < arguments.max_train_minutes and found and seconds_trained(found[-1]) >= 60 * minutes:
            continue
        train_once(
            folders[model],
            *("--cache_dir", arguments.output_dir / "latents", *flags[model]),
            *("--num_history_frames", history, "--seed", seed, "--max_train_minutes", minutes),
            config_file=arguments.config_file,
        )
    return folders


def evaluate(arguments: ConditioningArguments, folder: Path, model: str, history: int, seed: int) -> dict[str, Any]:
    """Evaluate one trained model."""
    names = (
        "first_seed",
        "pusher_radius",
        "num_clips",
        "num_histories",
        "scheduler",
        "timestep_spacing",
        "num_inference_steps",
        "dtype",
        "device",
    )
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    # the number of steps is part of the file name, because a longer training time adds steps
    steps = step_of(list_checkpoints(folder)[-1])
    name, seen = str(steps), max(arguments.num_history_frames)
    if history < seen:
        given["num_seen_frames"] = seen
        name += f"-seen-{seen}"
    report = folder / f"report-{name}.json"
    run_once(
        folder / f"evaluated-{name}.json",
        "pusht/evaluate.py",
        *("--model", folder, "--dataset", arguments.test_dataset, "--output", report),
        *("--num_history_frames", history, "--num_rollouts", 0, "--num_drives", 0),
        *(part for name, value in given.items() for part in (f"--{name}", value)),
    )
    found = json.loads(report.read_text(encoding="utf-8"))
    return {
        "model": model,
        "num_history_frames": history,
        "seed": seed,
        "parameters": IRASimPipeline.from_pretrained(folder).transformer.num_parameters(),
        "steps": steps,
        "evaluations": found["network_evaluations_per_clip"]["mean"],
        "figures": read_figures(found),
    }


def check_arguments(arguments: ConditioningArguments, own: dict[str, list[str]]) -> None:
    """Check the arguments, including those of the evaluation, before the training.

    Args:
        arguments: The arguments.
        own: Flags of train.py for each model.

    Raises:
        ValueError: If a value is invalid, or a flag must be omitted.
    """
    check_ranges(
        arguments,
        not_negative=("seeds", "first_seed", "num_histories"),
        at_least_1=("rounds", "num_history_frames", "num_clips", "num_inference_steps"),
        positive=("max_train_minutes", "pusher_radius"),
        choices={"dtype": ("float32", "bfloat16")},
    )
    if arguments.timestep_spacing and not arguments.scheduler:
        raise ValueError("`timestep_spacing` requires `scheduler`: also pass --scheduler.")
    if any(flag.split("=")[0] in ("--max_train_steps", "--max-train-steps") for part in own.values() for flag in part):
        raise ValueError(
            "`max_train_steps` must be omitted: `max_train_minutes` determines the length of the training."
        )


def main() -> None:
    parser = HfArgumentParser(ConditioningArguments, allow_abbrev=False)
    arguments, flags = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    unknown = [model for model in arguments.models if model not in MODELS]
    if unknown:
        raise ValueError(f"`models` must be among {', '.join(MODELS)}, got {', '.join(unknown)}.")
    own = model_flags(arguments, flags)
    check_arguments(arguments, own)
    runs = [
        evaluate(arguments, folder, model, history, seed)
        for history in arguments.num_history_frames
        for seed in arguments.seeds
        for model, folder in train_in_turn(arguments, own, history, seed).items()
    ]
    rows, differences = compare(runs)
    content = {
        "rows": rows,
        "differences": differences,
        "runs": runs,
        "flags": own,
    }
    write_report(arguments.output_dir, "conditioning", content, tables(rows, differences, runs))


if __name__ == "__main__":
    run_script(main)
