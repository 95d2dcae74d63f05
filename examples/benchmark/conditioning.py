r"""Does every frame gain from its own action? Frame-Ada, Video-Ada and LVDM on Push-T with one budget of time.

    python examples/benchmark/conditioning.py --output_dir runs/conditioning --max_train_minutes 30 --seeds 0 1 2 \
        --test_dataset data/pusht-test --dataset data/pusht-train --vae runs/pusht-vae \
        --action_space absolute --action_offset 256 --action_scale 0.03125 --learning_rate 1e-3 \
        --attention_backend _native_math

Same data, about as many parameters (train.py's own sizes, unless `--transformer_flags`, `--video_ada_flags` and
`--unet_flags` name others), the same wall clock; all other flags go to train.py as they are, for all models alike. Each
model is trained once a seed and number of history frames and evaluated by pusht/evaluate.py on the same clips. The models
of a seed take turns, `--rounds` of them, so that a machine whose speed drifts favours none. What is done is not done
again. Written are `conditioning.json` and `conditioning.md`. A pose that cannot be read counts as 96 px.

Intervals are Student's over the seeds, of the differences over pairs of runs of one seed; with one seed, and in the table of
single runs, they are evaluate.py's over clips, and differences of one pair have none. With several numbers of history frames
all models are scored on the same frames, those after the longest history.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from runs import run_once, train_once, write_report
from scipy import stats
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.training import checkpoints

MODELS = {
    "Frame-Ada": ["--conditioning", "frame"],
    "Video-Ada": ["--conditioning", "video"],
    "LVDM": ["--model", "unet"],
}
FIGURES = {
    "clip_psnr": "PSNR, dB",
    "gain_over_last_frame": "over repeating the seen frame, dB",
    "gain_over_shuffled_actions": "own over other actions, dB",
    "last_frame/moving/found": "both found",
    "last_frame/moving/pusher": "pusher error, px",
    "last_frame/moving/block_centre": "block error, px",
    "identification": "identification, 8 ways",
}
"""Figures of evaluate.py's report, with their titles."""


@dataclass
class ConditioningArguments:
    output_dir: Path = field(metadata={"help": "a folder for each run, and the report"})
    test_dataset: str = field(metadata={"help": "held-out data set made by collect.py"})
    max_train_minutes: float = field(metadata={"help": "wall clock of every training"})
    rounds: int = field(default=1, metadata={"help": "parts of the time, between which the models take turns"})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "any of these"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_history_frames: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "1 2 compares both on the same frames"}
    )
    transformer_flags: str = field(
        default="--patch_size 2",
        metadata={"help": 'flags of train.py for the transformers alone, as `--transformer_flags="--num_layers 2"`'},
    )
    video_ada_flags: str = field(default="", metadata={"help": "further ones for Video-Ada alone"})
    unet_flags: str = field(default="", metadata={"help": "the same for the U-Net"})
    config_file: str | None = field(
        default=None, metadata={"help": "config of `accelerate launch` (default: one process)"}
    )
    first_seed: int = field(default=1_000_000, metadata={"help": "first seed of the test set"})
    pusher_radius: float | None = field(default=None, metadata={"help": "radius of the test set's pusher"})
    num_clips: int = field(default=200, metadata={"help": "see evaluate.py, as the following"})
    num_histories: int = 50
    scheduler: str | None = None
    timestep_spacing: str | None = None
    num_inference_steps: int | None = None
    dtype: str = "float32"
    device: str = "cpu"


def read_figures(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures that a report holds, each as value, low and high."""
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
    """Mean of the seeds' figures with Student's 95 % interval; of one seed without."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return {"value": mean}
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {"value": mean, "low": mean - half, "high": mean + half}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one model: means over its seeds."""
    numbers = ("parameters", "steps", "evaluations")
    row: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in numbers}
    if len(runs) == 1:
        return row | runs[0]["figures"]
    return row | {name: over_seeds([run["figures"][name]["value"] for run in runs]) for name in runs[0]["figures"]}


def gains(first: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first model's figures are above another's, paired by seed."""
    pairs = [(one["figures"], two["figures"]) for one, two in zip(first, other, strict=True)]
    return {name: over_seeds([one[name]["value"] - two[name]["value"] for one, two in pairs]) for name in pairs[0][0]}


def compare(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each model and number of history frames, and one for what each choice gains.

    Gains are those of the first model over each other with the same history, and of each model with each further number of
    history frames over itself with the first.
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
    """A figure as text."""
    if value is None:
        return ""
    interval = f" [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value else ""
    return f"{value['value']:.3f}{interval}"


def table(leading: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown: their entries of these names, then their figures."""
    titles = [name.replace("num_history_frames", "history") for name in leading] + list(FIGURES.values())
    text = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n"
    for row in rows:
        cells = [value if isinstance(value := row[name], str) else f"{value:,.0f}" for name in leading]
        text += f"| {' | '.join(cells + [cell(row.get(name)) for name in FIGURES])} |\n"
    return text


def tables(rows: list[dict[str, Any]], differences: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Models, what each choice gains, and single runs."""
    parts = [table(("model", "num_history_frames", "seeds", "parameters", "steps", "evaluations"), rows)]
    if differences:
        parts.append(table(("model", "num_history_frames", "seeds"), differences))
    single = [run | run["figures"] for run in runs]
    parts.append(table(("model", "num_history_frames", "seed", "steps"), single))
    return "\n".join(parts)


def seconds_trained(folder: Path) -> float:
    """How long a model has been trained."""
    found = checkpoints(folder)
    return json.loads((found[-1] / "settings.json").read_text())["seconds"] if found else 0.0


def model_flags(arguments: ConditioningArguments, common: list[str]) -> dict[str, list[str]]:
    """Flags of train.py for each model; of flags given twice the last one holds."""
    own = {
        "Frame-Ada": arguments.transformer_flags,
        "Video-Ada": f"{arguments.transformer_flags} {arguments.video_ada_flags}",
        "LVDM": arguments.unet_flags,
    }
    return {model: common + MODELS[model] + shlex.split(own[model]) for model in arguments.models}


def turns(models: list[str], rounds: int, minutes: float) -> list[tuple[str, float]]:
    """The order in which models are trained, and up to how many minutes in all each time."""
    return [(model, minutes * (part / rounds)) for part in range(1, rounds + 1) for model in models]


def train_in_turn(
    arguments: ConditioningArguments, flags: dict[str, list[str]], history: int, seed: int
) -> dict[str, Path]:
    """Train the models of one seed and number of history frames, a part of the time each in turn."""
    folders = {model: arguments.output_dir / f"{model}-history-{history}-seed-{seed}" for model in flags}
    for model, minutes in turns(list(flags), arguments.rounds, arguments.max_train_minutes):
        if minutes < arguments.max_train_minutes and seconds_trained(folders[model]) >= 60 * minutes:
            continue
        train_once(
            folders[model],
            *("--cache_dir", arguments.output_dir / "latents", *flags[model]),
            *("--num_history_frames", history, "--seed", seed, "--max_train_minutes", minutes),
            config_file=arguments.config_file,
        )
    return folders


def evaluate(arguments: ConditioningArguments, folder: Path, model: str, history: int, seed: int) -> dict[str, Any]:
    """Evaluate one model."""
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
    steps = int(checkpoints(folder)[-1].name.split("-")[1])  # more after a longer budget
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
    found = json.loads(report.read_text())
    return {
        "model": model,
        "num_history_frames": history,
        "seed": seed,
        "parameters": IRASimPipeline.from_pretrained(folder).transformer.num_parameters(),
        "steps": steps,
        "evaluations": found["network_evaluations_per_clip"]["mean"],
        "figures": read_figures(found),
    }


def main() -> None:
    parser = HfArgumentParser(ConditioningArguments, allow_abbrev=False)
    arguments, flags = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if arguments.rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {arguments.rounds}.")
    unknown = [model for model in arguments.models if model not in MODELS]
    if unknown:
        raise ValueError(f"`models` must be among {', '.join(MODELS)}, got {', '.join(unknown)}.")
    own = model_flags(arguments, flags)
    if any("--max_train_steps" in part for part in own.values()):
        raise ValueError("`max_train_steps` must be left out: the clock ends every training (`max_train_minutes`).")
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
    main()
