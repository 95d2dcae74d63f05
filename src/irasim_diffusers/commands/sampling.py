"""Flags of the commands that predict, and the pipeline that they describe."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import embedded_checkpoint
from .files import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from .. import IRASimPipeline

SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}


def add_history_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model and of the frames from which a prediction starts."""
    add = parser.add_argument
    add("--model", default=str(embedded_checkpoint()), help="pipeline folder or Hub id (default: the embedded Push-T)")
    add("--frames", type=Path, help="image, or video that starts with the history frames")
    add("--history", type=int, help="history frames taken from a video (default: the model's maximum)")
    add("--resize", action="store_true", help="resize the frames to the model's size")


def add_sampling_flags(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add the flags of the sampler and the device.

    Args:
        parser: Parser of the command.
        dtype: Default of `--dtype`.
    """
    add = parser.add_argument
    add("--steps", type=int, help="denoising steps per chunk (default: the model's)")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's)")
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda if available)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=dtype,
        help="auto: bfloat16 if the device supports it in hardware, else float32 (default: %(default)s)",
    )


def load_pipeline(arguments: argparse.Namespace) -> IRASimPipeline:
    """Load the pipeline of `--model` with the sampler, the device and the dtype of the other flags.

    Raises:
        ValueError: If the pipeline cannot be loaded or a flag does not fit it.
    """
    import torch

    from .. import IRASimPipeline
    from ..devices import default_device, fast_dtype

    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {arguments.steps}.")
    device = default_device() if arguments.device == "auto" else arguments.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device of this machine, got {device!r}: {error}") from error
    dtype = fast_dtype(device) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if dtype == torch.float16:  # SDXL's autoencoder overflows in float16
        dtype = {"default": dtype, "vae": torch.float32}
    try:
        pipeline = IRASimPipeline.from_pretrained(arguments.model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model must be a pipeline folder or Hub id, got {arguments.model!r}: {error}") from error
    if arguments.scheduler:
        _set_scheduler(pipeline, arguments.scheduler)
    return pipeline.to(device)


def _set_scheduler(pipeline: IRASimPipeline, name: str) -> None:
    import diffusers

    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    changes: dict[str, Any] = {}
    if pipeline.transformer.config.prediction_type == "sample":
        changes["prediction_type"] = "v_prediction"  # which every scheduler supports
    if "clip_sample" in inspect.signature(scheduler_class.__init__).parameters:
        changes["clip_sample"] = False  # the config of PNDMScheduler has no such entry, and DDIM's default is True
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **changes)
    try:
        pipeline.check_scheduler()
    except ValueError as error:
        raise ValueError(f"--scheduler {name} does not fit the model: {error}") from error


def history_length(arguments: argparse.Namespace, pipeline: IRASimPipeline, num_frames: int) -> int:
    """Return the number of history frames to take from a video of `num_frames` frames.

    Raises:
        ValueError: If `--history` is out of range, or the video is too short.
    """
    most = pipeline.transformer.config.num_history_frames
    wanted = most if arguments.history is None else arguments.history
    if wanted < 1:
        raise ValueError(f"--history must be at least 1, got {wanted}.")
    if wanted > most:
        raise ValueError(f"--history must be at most {most} for this model, got {wanted}.")
    is_image = arguments.frames is not None and arguments.frames.suffix.lower() in IMAGE_SUFFIXES
    if is_image and arguments.history is None:
        return 1
    if num_frames < wanted:
        raise ValueError(
            f"--frames must hold at least the history of {wanted} frames, got {num_frames}: give a longer video, or "
            f"--history {num_frames}."
        )
    return wanted
