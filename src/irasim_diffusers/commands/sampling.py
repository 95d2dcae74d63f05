"""Flags of the commands that predict, and the pipeline that these flags select."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hub import missing_reason
from .files import check_flag_ranges, check_name, named_flags
from .history import frame_files, history_length, read_views, tile_views
from .loading import check_weights, load_checked, quiet_loading

if TYPE_CHECKING:
    from .. import IRASimPipeline

DTYPE_REMEDY = ", or --dtype float32 if the weights exceed the range of float16"
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


def add_sampling_flags(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add the flags of the sampler, the LoRA weights and the device.

    Args:
        parser: Parser of the command.
        dtype: Default of `--dtype`.
    """
    add = parser.add_argument
    add("--lora", metavar="PATH", help="LoRA weights: folder, .safetensors file or Hub id, as for load_lora_weights")
    add("--steps", type=int, help="denoising steps per chunk (default: the model's)")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's)")
    add("--seed", type=int, default=0, help="seed of the noise and other random numbers (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda if available)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=dtype,
        help="auto: bfloat16 if the device supports it in hardware, else float32 (default: %(default)s)",
    )


def check_sampling_flags(arguments: argparse.Namespace) -> None:
    """Check the flags that need no model.

    Raises:
        ValueError: If a number is out of range, the device does not exist, or a path contains NUL.
    """
    check_flag_ranges(arguments, {"steps": (1, None)})
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63), got {arguments.seed}.")
    if arguments.device != "auto":
        check_device(arguments.device)
    for flag in ("model", "lora"):
        check_name(f"--{flag}", getattr(arguments, flag) or "")


def check_device(name: str) -> None:
    """Raise ValueError if tensors cannot be created on a device."""
    import torch

    try:
        torch.zeros(1, device=name).item()  # fails on "meta", too
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device must be a device of this machine, got {name!r}: {error}") from error


def load_pipeline(arguments: argparse.Namespace) -> IRASimPipeline:
    """Load the pipeline of `--model` and apply `--lora`, `--scheduler`, `--device` and `--dtype`.

    Call `check_sampling_flags` first.

    Raises:
        ValueError: If the pipeline or the LoRA weights cannot be loaded, or a flag is not compatible with the pipeline.
    """
    import torch

    from .. import IRASimPipeline
    from ..devices import default_device, fast_dtype

    device = default_device() if arguments.device == "auto" else arguments.device
    dtype = fast_dtype(device) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if dtype == torch.float16:  # SDXL's autoencoder overflows in float16
        dtype = {"default": dtype, "vae": torch.float32}
    pipeline = load_checked(
        "--model",
        "a pipeline folder or Hub id",
        arguments.model,
        IRASimPipeline.from_pretrained,
        DTYPE_REMEDY,
        dtype=dtype,
    )
    if arguments.lora:
        try:
            with quiet_loading() as messages:
                pipeline.load_lora_weights(arguments.lora)
            check_weights(pipeline.components, messages, DTYPE_REMEDY)
        except Exception as error:
            known = isinstance(error, ValueError | OSError)
            reason = missing_reason(arguments.lora, error) or f"{'' if known else f'{type(error).__name__}: '}{error}"
            raise ValueError(
                f"--lora must be a folder, file or Hub id of LoRA weights for this model, got {arguments.lora!r}: {reason}"
            ) from error
    if arguments.scheduler:
        try:
            with quiet_loading():
                pipeline = pipeline.with_scheduler(SCHEDULERS[arguments.scheduler])
        except ValueError as error:
            raise ValueError(f"--scheduler {arguments.scheduler} is not compatible with the model: {error}") from error
    pipeline.check_scheduler()
    if arguments.steps is not None:
        _check_steps(pipeline.scheduler, arguments.steps)
    return pipeline.to(device)


def _check_steps(scheduler: Any, steps: int) -> None:
    """Raise ValueError if a scheduler has no valid timesteps for a number of steps."""
    from ..pipelines.schedulers import check_warmup

    most = scheduler.config.num_train_timesteps
    if steps > most:
        raise ValueError(f"--steps must be at most {most}, the number of training timesteps, got {steps}.")
    if not hasattr(scheduler, "alphas_cumprod"):
        return
    with named_flags(num_inference_steps="--steps"):
        check_warmup(scheduler, steps)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ValueError(f"--steps {steps} is not supported by {type(scheduler).__name__}: {error}") from error
    if scheduler.timesteps.max() >= most:  # `steps_offset` moves the timesteps
        raise ValueError(
            f"--steps must be less than {steps} for the {type(scheduler).__name__} of this model, got {steps}: its timesteps "
            f"would exceed {most - 1}."
        )


def open_start(arguments: argparse.Namespace) -> tuple[IRASimPipeline, np.ndarray, int]:
    """Read the frames and load the pipeline that the flags select. Call `check_sampling_flags` first.

    Returns:
        The pipeline, the video (T, H, W, 3), uint8, and the number of its history frames.

    Raises:
        ValueError: If a file cannot be read, or a flag is not compatible with the pipeline.
    """
    views = read_views(frame_files(arguments))  # before the model is loaded
    pipeline = load_pipeline(arguments)
    video = tile_views(views, pipeline.transformer.config.get("cameras"))
    return pipeline, video, history_length(arguments, pipeline, len(video))
