"""`irasim plan`: plan actions that reach a goal image or a high reward."""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .files import check_flag_ranges, check_output, named_flags, read_media
from .history import add_history_flags, frame_files
from .loading import load_reward
from .sampling import add_sampling_flags, check_sampling_flags, open_start

if TYPE_CHECKING:
    import torch

    from .. import IRASimPipeline
    from ..planning import Plan

SEARCH = {"candidates": 50, "iterations": 5, "std": 1.0, "knots": None}
PLANNERS: dict[str, dict[str, Any]] = {
    "cem": SEARCH,
    "mppi": SEARCH,
    "gradient": {"iterations": 5},
    "lines": {"candidates": 50, "radius": None},
}
"""Flags of each planner with their defaults."""

LIMITS = {
    "horizon": (1, 1000),
    "candidates": (1, 10_000),
    "iterations": (1, 10_000),
    "knots": (1, 1000),
    "batch_size": (1, None),
}
"""Lowest and highest value of each flag; the highest bounds the memory that a flag can request."""


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "plan",
        help="choose actions that lead to a goal image or a high reward",
        description="Plan actions with the world model, so that the last predicted frame is similar to a goal image or has a high "
        "reward. Writes the actions, and a video and a film strip of the predicted frames.",
    )
    parser.set_defaults(run=run)
    add_history_flags(parser)
    add_sampling_flags(parser, dtype="float32")
    add = parser.add_argument
    add("--goal", type=Path, help="goal image, or video whose last frame is the goal")
    add(
        "--encoder",
        help="folder or Hub id of a transformers vision model; its features of the predicted frames and of --goal are compared "
        "instead of pixels",
    )
    add("--reward", help="folder or Hub id of a FrameRegressor, instead of --goal")
    add(
        "--planner",
        choices=PLANNERS,
        default="cem",
        help="planner; `lines` ranks straight-line candidates, as in the paper (default: %(default)s)",
    )
    add("--position", help="current position as an action, such as 84,384; required for absolute actions")
    add("--horizon", type=int, default=15, help="number of actions (default: %(default)s)")
    add("--candidates", type=int, help="cem, mppi: action sequences per iteration; lines: in total (default: 50)")
    add("--iterations", type=int, help="cem, mppi, gradient: number of iterations (default: 5)")
    add("--std", type=float, help="cem (initial), mppi: standard deviation in normalized units (default: 1)")
    add(
        "--knots",
        type=int,
        help="cem, mppi: number of sampled time points; other actions are interpolated (default: all)",
    )
    add("--radius", type=float, help="lines (required): length of the lines, in the units of the first two components")
    add("--batch-size", type=int, default=64, help="number of candidates predicted together (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("irasim-plan.mp4"),
        help="mp4 to write; the actions (.csv) and a film strip (.png) are written next to it (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check the input, plan, and write the actions, the video and the film strip."""
    start = time.perf_counter()
    rows = frame_files(arguments)
    inputs = [arguments.goal, *(path for row in rows for path in row)]
    check_output(arguments.output, ".mp4", inputs)
    for suffix in (".csv", ".png"):
        check_output(arguments.output.with_suffix(suffix), suffix, inputs)
    check_sampling_flags(arguments)
    if not rows:
        raise ValueError("--frames is required: an image, or a video of the history frames.")
    if (arguments.goal is None) == (arguments.reward is None):
        raise ValueError("pass exactly one of --goal and --reward.")
    if arguments.encoder is not None and arguments.goal is None:
        raise ValueError(
            "--encoder requires --goal: features of the predicted frames are compared with those of the goal image."
        )
    _check_planner_flags(arguments)
    check_flag_ranges(arguments, LIMITS)
    if arguments.std is not None and not 0 < arguments.std < float("inf"):
        raise ValueError(f"--std must be positive and finite, got {arguments.std}.")
    with named_flags(num_knots="--knots"):
        planner = _planner(arguments)
    goal = None if arguments.goal is None else read_media(arguments.goal, "--goal")[-1]
    pipeline, video, history = open_start(arguments)
    objective, goal = _objective(arguments, goal, pipeline)
    init = _initial(arguments, pipeline)
    loaded = time.perf_counter()
    state = pipeline.start(video[:history], [arguments.seed], arguments.resize)
    source = "--reward" if arguments.reward else "--encoder" if arguments.encoder else "--goal"
    with named_flags(objective=source), tqdm(desc="planning", unit="candidate", total=_num_scored(arguments)) as bar:
        plan = planner(pipeline, state, Progress(objective, bar), init)
    seconds = time.perf_counter() - loaded
    _write(arguments.output, plan, goal, pipeline)
    count = len(plan.candidates)
    print(f"score {plan.score:.4f}, best of {count} candidates of {len(plan.actions)} actions in {seconds:.1f} s")
    print(f"wrote {', '.join(str(arguments.output.with_suffix(suffix)) for suffix in ('.mp4', '.csv', '.png'))}")
    print(f"{time.perf_counter() - start:.1f} s with loading")


class Progress:
    """Wrapper of an objective that advances a progress bar by the number of scored candidates.

    The first call is not counted: planners check the objective on the current frame.
    """

    def __init__(self, objective: Any, bar: tqdm) -> None:
        self.objective, self.bar, self.checked = objective, bar, False

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Score frames or latents."""
        scores = self.objective(frames)
        self.bar.update(len(frames) if self.checked else 0)
        self.checked = True
        return scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)


def _num_scored(arguments: argparse.Namespace) -> int:
    """Return the number of action sequences that the planner scores."""
    if arguments.planner == "lines":
        return arguments.candidates
    if arguments.planner == "gradient":
        return arguments.iterations + 1
    return arguments.candidates * arguments.iterations + 2  # also the initial plan and the last mean


def _check_planner_flags(arguments: argparse.Namespace) -> None:
    """Set the defaults of the planner's flags.

    Raises:
        ValueError: If a flag is given that the planner does not use.
    """
    used = PLANNERS[arguments.planner]
    for flag in {flag: None for flags in PLANNERS.values() for flag in flags}:
        if getattr(arguments, flag) is None:
            setattr(arguments, flag, used.get(flag))
        elif flag not in used:
            others = ", ".join(name for name, flags in PLANNERS.items() if flag in flags)
            raise ValueError(
                f"--{flag} is not supported by --planner {arguments.planner} (only by {others}): omit it."
            )


def _planner(arguments: argparse.Namespace) -> Any:
    from ..planning import CEM, MPPI, Gradient, Rank, Scoring

    sampling = {} if arguments.steps is None else {"num_inference_steps": arguments.steps}
    scoring = Scoring(batch_size=arguments.batch_size, sampling=sampling)
    common: dict[str, Any] = {"horizon": arguments.horizon, "num_iterations": arguments.iterations, "scoring": scoring}
    search: dict[str, Any] = {
        "num_candidates": arguments.candidates,
        "std": arguments.std,
        "num_knots": arguments.knots,
        "seed": arguments.seed,
    }
    if arguments.planner == "cem":
        elites = max(1, arguments.candidates // 8)
        return CEM(**common, **search, num_elites=elites, min_std=min(CEM.min_std, arguments.std))
    if arguments.planner == "mppi":
        return MPPI(**common, **search)
    if arguments.planner == "gradient":
        return Gradient(**common)
    if arguments.radius is None:
        raise ValueError("--planner lines requires --radius: the length of the lines, in the units of the actions.")
    return Rank(scoring=scoring)


def _objective(
    arguments: argparse.Namespace, goal: np.ndarray | None, pipeline: IRASimPipeline
) -> tuple[Any, np.ndarray | None]:
    """Return the objective, and the goal image (H, W, 3) in the model's size or, for a reward, None."""
    import PIL.Image

    from ..rewards import GoalImage, pretrained_encoder

    if goal is None:
        return load_reward(arguments.reward, pipeline.device), None
    height, width = pipeline.frame_size
    if arguments.resize and goal.shape[:2] != (height, width):
        goal = np.asarray(PIL.Image.fromarray(goal).resize((width, height), PIL.Image.Resampling.BILINEAR))
    if goal.shape[:2] != (height, width):
        raise ValueError(
            f"--goal must be {height}x{width} (height x width) for this model, got {goal.shape[0]}x{goal.shape[1]}: pass "
            "--resize to resize it."
        )
    encoder = None
    if arguments.encoder is not None:
        try:
            encoder = pretrained_encoder(arguments.encoder)
        except Exception as error:
            raise ValueError(f"--encoder must be a vision model, got {arguments.encoder!r}: {error}") from error
    return GoalImage(goal, encoder), goal


def _initial(arguments: argparse.Namespace, pipeline: IRASimPipeline) -> torch.Tensor | None:
    """Return the plans from which the planner starts; None for no motion."""
    import torch

    from ..planning import straight_lines

    space, position = pipeline.action_space, None
    if arguments.position is not None:
        try:
            position = torch.tensor([float(value) for value in arguments.position.split(",")])
        except ValueError:
            position = torch.tensor([])
        if len(position) != len(space) or not position.isfinite().all():
            raise ValueError(
                f"--position must be {len(space)} finite numbers separated by commas, got {arguments.position!r}."
            )
        if space.has_targets and not torch.equal(space.clip(position), position):
            bounds = ", ".join(f"[{low:g}, {high:g}]" for low, high in zip(space.low, space.high, strict=True))
            raise ValueError(
                f"--position must be inside the bounds of its components, {bounds}, got {arguments.position!r}."
            )
        try:
            position = space.prepare(position[None])[0, 0]
        except ValueError as error:
            raise ValueError(str(error).replace("`actions`", "--position")) from error
    elif space.has_targets:
        raise ValueError("--position is required for absolute targets: the current position, such as 84,384.")
    if arguments.planner == "lines":
        candidates = arguments.candidates
        return straight_lines(
            space, arguments.horizon, arguments.radius, candidates, position, range(min(2, len(space))), arguments.seed
        )
    return None if position is None else space.hold(position).repeat(arguments.horizon, 1)


def _write(path: Path, plan: Plan, goal: np.ndarray | None, pipeline: IRASimPipeline) -> None:
    """Write the actions, the film strip, and the video with the goal next to the plan."""
    from ..data import write_video
    from ..files import temporary_path
    from ..pictures import film_strip

    predicted = plan.frames()
    seen = pipeline.decode(plan.state.latents)[0]
    frames = [(part.movedim(1, -1) * 255).round().byte().cpu().numpy() for part in (seen, predicted)]
    rows = {"plan": np.concatenate(frames)}
    if goal is not None:
        rows["goal"] = np.broadcast_to(goal, rows["plan"].shape)
    scale = max(1, 288 // goal.shape[0]) if goal is not None else max(1, 288 // predicted.shape[-2])
    large = [video.repeat(scale, axis=1).repeat(scale, axis=2) for video in rows.values()]
    strip = film_strip(rows, len(frames[0]))
    with temporary_path(path.with_suffix(".csv")) as table, temporary_path(path.with_suffix(".png")) as image:
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([pipeline.action_space.names, *plan.actions.tolist()])
        strip.save(image)
        write_video(path, np.concatenate(large, axis=2), pipeline.fps or 10.0)
