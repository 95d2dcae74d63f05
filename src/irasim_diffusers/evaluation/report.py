"""Write the report of an evaluation: JSON, Markdown and images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import temporary_path
from ..metrics import ALTERATIONS, STRATA, bootstrap
from ..pictures import film_strip
from .predictors import ClipReader, Predictor
from .protocols import Clip, EvaluationProtocol, published_figures

TITLES = {
    "psnr": "PSNR, mean of frames (dB)",
    "ssim": "SSIM, mean of frames",
    "clip_psnr": "PSNR of the mean error of a clip (dB)",
    "lpips": "LPIPS, AlexNet",
    "latent_l2": "latent L2",
    "fid": "FID",
    "fvd": "FVD",
}
COMPARED = ("psnr", "ssim", "clip_psnr")
"""Metrics that are also computed for repeating the last history frame."""


def summarise(
    figures: Sequence[dict[str, Any]], protocol: EvaluationProtocol, seed: int, published: str | None = None
) -> dict[str, Any]:
    """Summarize the metrics of all clips.

    Args:
        figures: Metrics of each clip from `score_clip`, with its `name`.
        protocol: Protocol of the clips.
        seed: Seed of the bootstrap.
        published: Dataset whose results in the paper are shown for comparison.

    Returns:
        `n`: number of clips; `metrics`: mean of each metric with its interval over clips; `last_frame`: means of `COMPARED` for
        repeating the last history frame; `gain_over_last_frame`: mean difference of `clip_psnr`; `horizon`: PSNR of the
        predictions and of the last history frame by index of the predicted frame; `clips`: the best, median and worst clip by
        `clip_psnr`; `published`: results of the paper; `protocol` and `network_evaluations_per_window`.

    Raises:
        ValueError: If the paper reports no results for this protocol and `published`.
    """

    def interval(values: Any) -> dict[str, float]:
        return bootstrap(np.asarray(values, dtype=np.float64), np.random.default_rng(seed))

    def mean_of(part: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
        return interval([np.mean(one[name]) for one in part])

    last = [one["last_frame"] for one in figures]
    own = np.array([one["clip_psnr"] for one in figures])
    order = np.argsort(own, kind="stable")
    evaluations = [one["network_evaluations"] for one in figures if "network_evaluations" in one]
    names = [name for name in ("psnr", "ssim", "clip_psnr", "lpips", "latent_l2") if name in figures[0]]
    return {
        "protocol": {"name": protocol.name, "text": protocol.text},
        "n": len(figures),
        "metrics": {name: mean_of(figures, name) for name in names},
        "last_frame": {name: mean_of(last, name) for name in COMPARED},
        "gain_over_last_frame": interval(own - [one["clip_psnr"] for one in last]),
        "network_evaluations_per_window": float(np.mean(evaluations)) if evaluations else None,
        "horizon": {"model": _horizon(figures, seed), "last_frame": _horizon(last, seed)},
        "clips": {
            which: {"name": figures[place]["name"], "clip_psnr": float(own[place])}
            for which, place in (("best", order[-1]), ("median", order[len(order) // 2]), ("worst", order[0]))
        },
        "published": {} if published is None else {"dataset": published} | published_figures(protocol, published),
    }


def _horizon(figures: Sequence[dict[str, Any]], seed: int) -> list[dict[str, float]]:
    """Return the mean PSNR of each predicted frame, over the clips that are long enough."""
    longest = max(len(one["psnr"]) for one in figures)
    return [
        bootstrap(np.array([one["psnr"][k] for one in figures if len(one["psnr"]) > k]), np.random.default_rng(seed))
        for k in range(longest)
    ]


def write_report(
    report: dict[str, Any], output: Path, clips: Sequence[Clip], reader: ClipReader, predictor: Predictor
) -> None:
    """Write `report.json`, `report.md` and images into a folder.

    Args:
        report: Report of `evaluate`.
        output: The folder, which contains `sensitivity.npy` if the report includes the faithfulness.
        clips: All clips.
        reader: Reader of the clips.
        predictor: Predictor; the best, median and worst clip are predicted again for their images.
    """
    numbers = {clip.name: number for number, clip in enumerate(clips)}
    for which, clip in report["clips"].items():
        data = reader(numbers[clip["name"]])
        (prediction,) = predictor.predict([data])
        rows = {"truth": data.truth, "prediction": prediction.frames}
        videos = {name: np.concatenate([data.history, frames]) for name, frames in rows.items()}
        with temporary_path(output / f"{which}.png") as partial:
            film_strip(videos, len(data.history)).save(partial)
    plot_horizon(report["horizon"], output / "horizon.png")
    if "faithfulness" in report:
        names = list(report["faithfulness"]["sensitivity"]["grey_levels_per_deviation"])
        plot_sensitivity(np.load(output / "sensitivity.npy"), names, output / "sensitivity.png")
    with temporary_path(output / "report.md") as partial:
        partial.write_text(markdown(report), encoding="utf-8")
    with temporary_path(output / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2), encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """Format the report as Markdown."""
    parts = [
        f"# {report['setting'].get('predictions') or report['setting'].get('model', 'Predictions')} on "
        f"{report['setting'].get('dataset', 'clips')}",
        f"Protocol {report['protocol']['name']}: {report['protocol']['text']}. {report['n']} clips. Means over clips "
        "with bootstrap 95 % intervals; n is the number of clips (for FID, of frames). The history is never scored. The ground "
        "truth consists of recorded frames, not of reconstructions by the autoencoder.",
        _table(report),
    ]
    if report["published"]:
        parts.append(
            "*Reported: results of the paper (arXiv 2406.14540) on its own test clips of "
            f"{report['published']['dataset']}, not measured here.*"
        )
    if report.get("skipped_episodes"):
        parts.append(_skipped_text(report["skipped_episodes"]))
    parts.append("![PSNR by predicted frame](horizon.png)")
    if "faithfulness" in report:
        parts += ["## Action faithfulness", _faithfulness_text(report["faithfulness"])]
    parts.append("## Best, median and worst clip")
    parts += [
        f"{which.capitalize()}, {clip['name']}: {clip['clip_psnr']:.2f} dB\n\n![{which}]({which}.png)"
        for which, clip in report["clips"].items()
    ]
    evaluations = report["network_evaluations_per_window"]
    setting = report["setting"] | ({"network evaluations per window": f"{evaluations:g}"} if evaluations else {})
    rows = [f"| {name} | {_cell(value)} |" for name, value in setting.items() if name != "command"]
    parts += ["## Setting", "\n".join(["| | |", "|---|---|", *rows])]
    if "command" in setting:
        parts.append(f"```bash\n{setting['command']}\n```")
    return "\n\n".join(parts) + "\n"


def _skipped_text(skipped: Sequence[dict[str, Any]]) -> str:
    lines = [f"- episode {one['episode']}: {_cell(one['error'])}" for one in skipped]
    return "\n".join([f"{len(skipped)} episodes could not be read and were skipped:\n", *lines])


def _table(report: dict[str, Any]) -> str:
    """Format a table of the metrics.

    The columns are this evaluation, repeating the last history frame, and reported results.
    """
    reported = {name: values for name, values in report["published"].items() if name != "dataset"}
    header = [
        "metric",
        "n",
        "measured",
        "repeating the last history frame",
        *(f"{name} (reported)" for name in reported),
    ]
    rows = [header, ["---"] * len(header)]
    known = report["metrics"].keys() | report["distances"].keys() | {key for one in reported.values() for key in one}
    for name in (name for name in TITLES if name in known):
        measured = report["metrics"].get(name)
        value = report["distances"].get(name)
        here = _interval(measured, name) if measured else f"{value['value']:.2f}" if value else "not measured"
        last = report["last_frame"].get(name)
        others = [f"{one[name]:g}" if name in one else "" for one in reported.values()]
        count = (measured or value or {"n": ""})["n"]
        rows.append([TITLES[name], f"{count}", here, _interval(last, name) if last else "", *others])
    gain = _interval(report["gain_over_last_frame"], "psnr")
    rows.append(["gain over repeating the last frame (dB)", f"{report['n']}", gain, "", *[""] * len(reported)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _interval(value: dict[str, float], name: str) -> str:
    digits = 2 if "psnr" in name else 4
    mean, low, high = (round(value[each], digits) + 0.0 for each in ("mean", "low", "high"))  # no negative zero
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _faithfulness_text(found: dict[str, Any]) -> str:
    groups = [name for name in ("all", *STRATA) if name in found["identification"]]
    costs = {
        "shuffled": "loss with the actions of another clip (dB)",
        "held": "loss with hold actions (dB)",
        "reversed": "loss with reversed actions (dB)",
    }
    rate = f"identified among {found['ways']} (chance {1 / found['ways']:.0%})"
    rows = [["clips", "n", rate, *(costs[name] for name in ALTERATIONS)], ["---"] * (3 + len(ALTERATIONS))]
    for group in groups:
        share = found["identification"][group]
        rows.append(
            [
                group,
                f"{share['n']}",
                f"{share['mean']:.1%} [{share['low']:.1%}, {share['high']:.1%}]",
                *(_interval(found["gap"][name][group], "psnr") for name in ALTERATIONS),
            ]
        )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    explanation = (
        "The clips are divided into thirds by the motion in the true frames. Identification: fraction of clips for which the "
        "prediction with the true actions is closer to the ground truth than predictions with the actions of similar clips. "
        "Loss: decrease of the PSNR with altered actions."
    )
    maps = (
        "![sensitivity](sensitivity.png)\n\nSensitivity: mean absolute pixel change (0 to 255) per standard deviation of one "
        f"action component, averaged over {found['sensitivity']['n']} clips."
    )
    return "\n\n".join([f"**{found['verdict']['text']}**", table, explanation, maps])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def plot_horizon(horizon: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot the PSNR against the number of the predicted frame, with intervals."""
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    for name, label in (("model", "prediction"), ("last_frame", "repeating the last history frame")):
        means, lows, highs = ([point[key] for point in horizon[name]] for key in ("mean", "low", "high"))
        steps = np.arange(1, len(means) + 1)
        axes.plot(steps, means, label=label, marker="." if len(means) == 1 else None)
        axes.fill_between(steps, lows, highs, alpha=0.3)
    axes.set(xlabel="predicted frame", ylabel="PSNR (dB)")
    axes.legend()
    with temporary_path(path) as partial:
        figure.savefig(partial, dpi=120, bbox_inches="tight")


def plot_sensitivity(maps: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Plot a map (H, W) for each action component, all with the same scale."""
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = _figure(3 * columns + 1, 3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for axes, name, values in zip(grid.ravel(), names, maps, strict=False):
        image = axes.imshow(values * 255, vmin=0, vmax=max(maps.max() * 255, 1e-9), cmap="magma")
        axes.set_title(name)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="pixel change (0 to 255) per standard deviation")
    with temporary_path(path) as partial:
        figure.savefig(partial, dpi=120, bbox_inches="tight")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))
