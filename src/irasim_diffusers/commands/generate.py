"""`irasim generate`: predict the video of given actions."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import embedded_checkpoint
from .files import check_output, frame_rate, read_actions
from .history import add_history_flags, check_start, frame_files
from .sampling import add_sampling_flags, check_sampling_flags, open_start

if TYPE_CHECKING:
    from .. import IRASimPipeline


def add_parser(subparsers: Any) -> None:
    """Add `generate` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "generate",
        help="predict the video of given actions",
        description="Predict the video of given actions. Without arguments, the embedded Push-T model predicts its held-out clip.",
    )
    parser.set_defaults(run=run)
    add_history_flags(parser)
    add_sampling_flags(parser, dtype="float32")
    add = parser.add_argument
    add(
        "--actions",
        type=Path,
        help=".npy, .csv or .json of actions (n, A), in the units of the model's action space; required with --frames",
    )
    add(
        "--output",
        type=Path,
        default=Path("irasim.mp4"),
        help="mp4 to write; a film strip (.png) is written next to it (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check the input, predict, write the video and the film strip, and print the timing."""
    start = time.perf_counter()
    strip_path = arguments.output.with_suffix(".png")
    rows = frame_files(arguments)
    inputs = [arguments.actions, *(path for row in rows for path in row)]
    check_output(arguments.output, ".mp4", inputs)
    check_output(strip_path, ".png", inputs)
    check_sampling_flags(arguments)
    if rows and arguments.actions is None:
        raise ValueError("--frames requires --actions: a .npy, .csv or .json file of actions, one row per frame.")
    check_start(arguments)
    actions = read_actions(arguments.actions or embedded_checkpoint() / "example_actions.csv")
    pipeline, video, history = open_start(arguments)
    # later frames are ground truth only if frames and actions come from the same recording
    truth = video[history:][: len(actions)] if bool(rows) == (arguments.actions is not None) else video[:0]
    prediction, figures = _predict(arguments, pipeline, video[:history], actions)
    seen = video[:history]
    if seen.shape[1:] != prediction.shape[1:]:
        seen, truth = prediction[:0], truth[:0]  # with --resize, the true frames have a different size
    fps = (frame_rate(rows[0][0]) if rows else None) or pipeline.transformer.config.fps or 10.0
    _write_outputs(arguments.output, strip_path, seen, prediction, truth, fps)
    if len(truth):
        _print_psnr(prediction[: len(truth)], seen, truth)
    print(f"{figures}; {time.perf_counter() - start:.1f} s with loading")
    print(f"wrote {arguments.output} and {strip_path}")


def _predict(
    arguments: argparse.Namespace, pipeline: IRASimPipeline, history: np.ndarray, actions: np.ndarray
) -> tuple[np.ndarray, str]:
    """Predict the frames (n, H, W, 3), uint8, and describe the speed."""
    import torch

    from ..evaluation import EvaluationCounter

    start = time.perf_counter()
    with EvaluationCounter(pipeline.transformer) as evaluations:
        frames = pipeline(
            history,
            actions,
            num_inference_steps=arguments.steps,
            generator=torch.Generator().manual_seed(arguments.seed),
            resize=arguments.resize,
            output_type="np",
        ).frames[0]
    seconds = time.perf_counter() - start
    figures = (
        f"{len(frames)} frames in {seconds:.1f} s, {len(frames) / seconds:.1f} frames/s, {evaluations.count} network "
        f"evaluations with {type(pipeline.scheduler).__name__}"
    )
    return (frames * 255).round().astype(np.uint8), figures


def _print_psnr(prediction: np.ndarray, seen: np.ndarray, truth: np.ndarray) -> None:
    from ..metrics import psnr

    last = np.broadcast_to(seen[-1:], truth.shape)
    print(
        f"PSNR {psnr(prediction / 255.0, truth / 255.0):.2f} dB over {len(truth)} frames against the true frames "
        f"(last-frame baseline: {psnr(last / 255.0, truth / 255.0):.2f} dB)"
    )


def _write_outputs(
    video_path: Path, strip_path: Path, seen: np.ndarray, prediction: np.ndarray, truth: np.ndarray, fps: float
) -> None:
    from ..data import write_video
    from ..files import temporary_path
    from ..pictures import film_strip

    rows = {"prediction": np.concatenate([seen, prediction])}
    if len(truth):
        full = np.concatenate([seen, truth])
        missing = len(rows["prediction"]) - len(full)
        rows = {"truth": np.concatenate([full, np.repeat(full[-1:], missing, axis=0)]) if missing else full} | rows
    scale = max(1, 288 // prediction.shape[1])
    large = [frames.repeat(scale, axis=1).repeat(scale, axis=2) for frames in rows.values()]
    strip = film_strip(rows, len(seen))
    with temporary_path(strip_path) as partial:
        strip.save(partial)
        write_video(video_path, np.concatenate(large, axis=2), fps)
