"""Write the report of the Push-T study: tables, plots, and links to videos."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_jobs import RESULT, write_json

from irasim_diffusers.data import read_video
from irasim_diffusers.evaluation import summarise_policies
from irasim_diffusers.files import temporary_path, write_text
from irasim_diffusers.json_files import read_json
from irasim_diffusers.metrics import bootstrap
from irasim_diffusers.pictures import film_strip

Table = tuple[list[str], list[list[str]]]


def write_report(root: Path, stages: Sequence[str]) -> None:
    """Write `report.md`, `report.json` and the plots from the results of the complete stages."""
    results = {stage: read_json(root / stage / RESULT) for stage in stages if (root / stage / RESULT).is_file()}
    sections: dict[str, Callable[[Any, Path], tuple[str, Any]]] = {
        "policies": policy_section,
        "rewards": reward_section,
        "evaluation": evaluation_section,
        "planning": planning_section,
        "goal_images": image_section,
        "reaching": reaching_section,
        "implausible": implausible_section,
    }
    text, figures = (
        [
            "# Push-T study",
            "",
            "Unless stated otherwise, intervals are 95 % bootstrap intervals over clips, episodes or, for correlations, seeds. "
            "`P0` is the world model without policy rollouts in its training set, `P100` the one with 100, and so on. "
            "`simulator` is the upper bound.",
        ],
        {},
    )
    for stage, section in sections.items():
        if stage in results:
            paragraph, figures[stage] = section(results[stage], root)
            text += ["", paragraph]
    write_text(root / "report.md", "\n".join(text) + "\n")
    write_json(root / "report.json", figures)


def policy_section(result: Any, root: Path) -> tuple[str, Any]:
    """Report the largest IoU of an episode of each policy in the simulator, averaged over episodes."""
    rows = [[name, f"{iou:.3f}"] for name, iou in result["ious"].items()]
    return (
        f"## Policies\n\nPlanners improve policy {result['planned']}.\n\n"
        + markdown((["policy (training steps)", "largest IoU in the simulator (mean over episodes)"], rows)),
        result["ious"],
    )


def reward_section(result: Any, root: Path) -> tuple[str, Any]:
    """Report the errors of the reward networks on frames of the simulator and of the base model."""
    columns = {"simulator_frames": "simulator", "model_frames": "model", "model_last_frame": "model, frame 15"}
    rows = [[target, *(interval(result[target][key]) for key in columns)] for target in ("iou", "closeness")]
    success = result["success"]
    note = (
        f"A predicted frame counts as success above an IoU of {success['threshold']:.3f}. This classifies "
        f"{success['accuracy']:.0%} of {success['n']} held-out simulator episodes correctly ({success['solved']:.0%} are solved)."
    )
    table = markdown((["mean absolute error", *columns.values()], rows))
    return f"## Rewards\n\n{table}\n\n{note}", {"success": success} | {
        target: {key: result[target][key] for key in columns} for target in ("iou", "closeness")
    }


def evaluation_section(result: Any, root: Path) -> tuple[str, Any]:
    """Report how well each world model agrees with the simulator."""
    reports = {}
    for model in result["models"]:
        names = [name for name in result["episodes"] if name.startswith(f"{model}-")]
        reports[model] = summarise_policies(
            {name.removeprefix(f"{model}-"): result["episodes"][name] for name in names}
        )
    rows = []
    for model, report in reports.items():
        for figure in ("success", "score"):
            found = report["agreement"][figure]
            same = np.mean([entry["same_outcome"]["mean"] for entry in report["policies"].values()])
            cells = [estimate(found[name]) for name in ("pearson", "spearman", "mmrv")]
            rows.append([model, figure, *cells, f"{same:.0%}" if figure == "success" else ""])
    first = next(iter(reports.values()))
    table = markdown((["world model", "figure", "Pearson", "Spearman", "MMRV", "same outcome"], rows))
    header = ["policy", "simulator", *reports]
    scores = [
        [name, interval(first["policies"][name]["real"]["score"])]
        + [interval(report["policies"][name]["model"]["score"]) for report in reports.values()]
        for name in first["policies"]
    ]
    plot(root / "evaluation.png", lambda axes: draw_agreement(axes, reports))
    videos = sorted((root / "evaluation").glob("episodes/*/*/episodes/*/*.mp4"))
    links = ", ".join(
        f"[{path.parts[-5]} {path.parts[-2]}]({path.relative_to(root).as_posix()})" for path in videos[:24]
    )
    note = f"{len(first['policies'])} policies, {first['num_seeds']} seeds; {result['excluded']} solved starts were excluded."
    return (
        f"## Policy evaluation\n\n{note} The score is the largest coverage of an episode divided by 0.95.\n\n{table}\n\n"
        f"{markdown((header, scores))}\n\n![success in the model against the simulator](evaluation.png)\n\n"
        f"Simulator on the left, model on the right: {links}.",
        reports,
    )


def planning_section(result: Any, root: Path) -> tuple[str, Any]:
    """Report the metrics of each planner, and its gain relative to that of the exact simulator."""
    rng = np.random.default_rng(0)
    names = ("score", "iou", "iou_stopped", "success")
    figures: dict[str, Any] = {
        cell: {name: bootstrap(np.array([each[name] for each in found]), rng) for name in names}
        | {"seconds": float(np.mean([each["seconds"] for each in found]))}
        for cell, found in result["results"].items()
    }
    rows = [
        [cell, *(interval(found[name]) for name in names), f"{found['seconds']:.2f}"]
        for cell, found in figures.items()
    ]
    header = ["planner", "score", "IoU", "IoU until success", "success", "s per decision"]
    count = figures["policy"]["score"]["n"]
    most = max(int(cell.rsplit("-K")[1]) for cell in figures if "-K" in cell)
    base, bound = (figures[cell]["score"]["mean"] for cell in ("policy", f"simulator-K{most}"))
    gains = {
        cell: (found["score"]["mean"] - base) / (bound - base)
        for cell, found in figures.items()
        if cell.endswith(f"-K{most}") and bound > base
    }
    note = (
        ", ".join(f"{cell} {gain:.0%}" for cell, gain in gains.items())
        or "undefined, because the latter is not positive"
    )
    plot(root / "planning.png", lambda axes: draw_planning(axes, figures, result["cells"]))
    folder = root / "planning" / "videos"
    shown = ["policy", *(cell for cell in figures if cell.endswith(f"-K{most}"))]
    strip = film_strip({cell: read_video(folder / f"{cell}.mp4") for cell in shown}, 1, columns=9)
    with temporary_path(root / "planning_strip.png") as partial:
        strip.quantize(64).save(partial, optimize=True)
    videos = ", ".join(f"[{cell}](planning/videos/{cell}.mp4)" for cell in figures)
    return (
        f"## Planning\n\n{count} starts; {result['excluded']} solved starts were excluded.\n\n{markdown((header, rows))}\n\n"
        f"Gain in score over the policy, as a fraction of the gain with the exact simulator: {note}.\n\n"
        f"![IoU against K](planning.png)\n\nVideos of the first start: {videos}.\n\n![the first start](planning_strip.png)",
        figures | {"gain": gains},
    )


def image_section(result: Any, root: Path) -> tuple[str, Any]:
    """Report the success of pushes that were ranked by a goal image."""
    rng, rows, figures = np.random.default_rng(0), [], {}
    for model, found in result["results"].items():
        kept = [each for each in found if each]
        if not kept:
            continue
        figures[model] = {
            name: bootstrap(np.array([each[name] for each in kept]), rng) for name in ("mse", "features", "random")
        } | {"excluded": len(found) - len(kept)}
        rows.append([model, *(interval(figures[model][name]) for name in ("mse", "features", "random"))])
        rows[-1] += [str(len(kept)), str(len(found) - len(kept))]
    header = ["world model", "MSE", "features", "random", "n", "excluded"]
    note = "Success of the five best straight lines, and of all lines (random). "
    note += "Starts from which no line for the goal image moves the block are excluded."
    return f"## Goal images\n\n{note}\n\n{markdown((header, rows))}", figures


def reaching_section(result: Any, root: Path) -> tuple[str, Any]:
    """Report the success of CEM in DINO-WM's protocol."""
    rng, rows, figures = np.random.default_rng(0), [], {}
    for cell, found in result["results"].items():
        kept = [each for each in found if each]
        if not kept:
            continue
        figures[cell] = bootstrap(np.array([each["success"] for each in kept]), rng) | {
            "seconds": float(np.mean([each["seconds"] for each in kept])),
            "excluded": len(found) - len(kept),
        }
        kind, model = cell.split("-", 1)
        rows.append([kind, model, interval(figures[cell]), f"{figures[cell]['seconds']:.1f}"])
        rows[-1] += [str(len(kept)), str(len(found) - len(kept))]
    header = ["goals", "world model", "success", "s per plan", "n", "solved at the start"]
    return f"## Goals 25 steps ahead (DINO-WM's protocol)\n\n{markdown((header, rows))}", figures


def implausible_section(result: Any, root: Path) -> tuple[str, Any]:
    """Report the rates of implausible frames in the predictions of the models and in the simulator."""
    rng, rows, figures = np.random.default_rng(0), [], {}
    for cell, found in result["results"].items():
        kind, model = cell.split("-", 1)
        figures[cell] = {
            f"{place}_{name}": bootstrap(np.array([each[place][name] for each in found]), rng)
            for name in ("found", "outside", "inside")
            for place in ("model", "simulator")
        }
        rows.append([kind, model, *(interval(value) for value in figures[cell].values())])
    header = ["targets", "world model", "bodies found", "(simulator)", "block beyond wall", "(simulator)"]
    header += ["pusher in block", "(simulator)"]
    note = "Fractions of frames. The last four columns are relative to the frames in which both bodies are found."
    return f"## Implausible targets\n\n{note}\n\n{markdown((header, rows))}", figures


def markdown(table: Table) -> str:
    """Format a table as Markdown."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(figure: Any) -> str:
    """Format a mean with its interval."""
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def estimate(figure: Any) -> str:
    """Format an agreement metric with its interval over seeds, and over policies if known."""
    if figure["value"] is None:
        return "undefined"
    text = f"{figure['value']:.3f}"
    if figure["low"] is not None:
        text += f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    if figure.get("fisher_low") is not None:
        text += f"; over policies [{figure['fisher_low']:.3f}, {figure['fisher_high']:.3f}]"
    return text


def plot(path: Path, draw: Callable[[Axes], None]) -> None:
    """Draw a plot and write it to `path`."""
    figure = Figure(figsize=(5, 4))
    draw(figure.add_subplot())
    with temporary_path(path) as partial:
        figure.savefig(partial, dpi=110, bbox_inches="tight")


def error_bars(figures: Sequence[Any]) -> np.ndarray:
    """Return the lengths (2, n) of the error bars of bootstrap intervals."""
    return np.array([[each["mean"] - each["low"], each["high"] - each["mean"]] for each in figures]).clip(min=0).T


def draw_agreement(axes: Axes, reports: Any) -> None:
    """Plot success and score of the policies in each model against the simulator."""
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for index, (model, report) in enumerate(reports.items()):
        for figure, marker in (("success", "s"), ("score", "o")):
            pairs = [(entry["real"][figure], entry["model"][figure]) for entry in report["policies"].values()]
            real, found = zip(*pairs, strict=True)
            axes.errorbar(
                [each["mean"] for each in real],
                [each["mean"] for each in found],
                xerr=error_bars(real),
                yerr=error_bars(found),
                fmt=marker,
                color=f"C{index}",
                markerfacecolor="none" if figure == "success" else None,
                elinewidth=0.5,
                label=f"{model}, {figure}",
            )
    axes.set(xlabel="simulator", ylabel="world model", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    axes.legend(fontsize=7)


def draw_planning(axes: Axes, figures: Any, cells: Any) -> None:
    """Plot the IoU against the number of candidates, one line per model, from metrics and options by cell."""
    lines: dict[str, dict[int, Any]] = {}
    for cell, found in figures.items():
        if "-K" in cell:
            model, number = cell.rsplit("-K", 1)
            lines.setdefault(model, {1: figures["policy"]["iou"]})[int(number)] = found["iou"]
    for model, points in lines.items():
        values = [each["mean"] for each in points.values()]
        axes.errorbar(list(points), values, yerr=error_bars(list(points.values())), fmt="o-", capsize=2, label=model)
    for cell, marker in (("random", "x"), ("optimised", "^"), ("guarded", "v")):
        if cell in figures:
            axes.plot(cells[cell]["num_candidates"], figures[cell]["iou"]["mean"], marker, color="k", label=cell)
    axes.set(xscale="log", xlabel="candidates K", ylabel="IoU")
    axes.set_xticks(sorted(next(iter(lines.values()))), [str(number) for number in sorted(next(iter(lines.values())))])
    axes.minorticks_off()
    axes.legend(fontsize=7)
