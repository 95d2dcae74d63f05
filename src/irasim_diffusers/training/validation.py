"""Metrics and videos of held-out clips during training."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from ..data import write_video
from ..metrics import psnr
from ..pipelines import IRASimPipeline
from .loop import TrainingRun
from .saving import make_pipeline


def validate_run(run: TrainingRun, held_out: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Log metrics of the averaged model, and write and log a video. Every process must call this function.

    Args:
        run: The run.
        held_out: Clips from `validation_clips` in the main process; None in the others.
    """
    averaged = run.averaged()
    if held_out is None:
        return
    accelerator, arguments = run.accelerator, run.arguments
    pipeline = make_pipeline(run.vae, averaged.to(accelerator.device), DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    with accelerator.autocast():
        metrics, video = validate(pipeline, held_out, arguments.validation_inference_steps)
    accelerator.log(metrics, step=run.step)
    path = Path(arguments.output_dir) / f"validation/step-{run.step}.mp4"
    log_video(accelerator, video, path, run.config.fps or 10, run.step)
    text = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
    run.bar.write(f"step {run.step}, {time.perf_counter() - run.start:.0f} s: {text}")


def validate(
    pipeline: IRASimPipeline, clips: tuple[np.ndarray, np.ndarray], steps: int
) -> tuple[dict[str, float], np.ndarray]:
    """Compute metrics on held-out clips, and a video of the first four.

    Args:
        pipeline: The pipeline.
        clips: Frames (N, F, H, W, 3), uint8, of which the first h are history, and actions (N, n, A) with n = F - h.
        steps: Denoising steps.

    Returns:
        The mean PSNR in dB of predictions from the clips' own actions, of predictions from the actions of another clip (with a
        single clip, its own), and of the repeated last history frame; and a video (n, 2 H, up to 4 W, 3), uint8, of the true
        frames in the first row and the predictions in the second.
    """
    frames, actions = clips
    num_history_frames = frames.shape[1] - actions.shape[1]
    history, truth = frames[:, :num_history_frames], frames[:, num_history_frames:] / 255.0

    def predict(given: np.ndarray) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(frames))]
        return pipeline(history, given, num_inference_steps=steps, generator=generators, output_type="np").frames

    own = predict(actions)
    metrics = {
        "psnr": psnr(own, truth).mean(),
        "psnr_shuffled_actions": psnr(predict(np.roll(actions, 1, axis=0)), truth).mean(),
        "psnr_last_frame": psnr(np.broadcast_to(history[:, -1:] / 255.0, truth.shape), truth).mean(),
    }
    rows = [np.concatenate(list(clips[:4]), axis=2) for clips in (truth, own)]  # (n, H, up to 4 W, 3) each
    return metrics, (np.concatenate(rows, axis=1) * 255).round().astype(np.uint8)


def log_video(accelerator: Accelerator, video: np.ndarray, path: Path, fps: float, step: int) -> None:
    """Write the validation video, and log it to wandb or Trackio; TensorBoard receives the last frame."""
    write_video(path, video, fps)
    for tracker in accelerator.trackers:
        if tracker.name in ("wandb", "trackio"):
            tracker.log({"validation": import_module(tracker.name).Video(str(path))}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({"validation": video[-1:]}, step=step, dataformats="NHWC")
