"""Flags of the commands that predict, and functions that load what these flags select."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import embedded_checkpoint
from ..files import missing_reason
from .files import IMAGE_SUFFIXES, check_flag_ranges, check_name, read_media

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from .. import IRASimPipeline
    from ..rewards import FrameRegressor

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


def add_history_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model and of the frames from which a prediction starts."""
    add = parser.add_argument
    add(
        "--model",
        default=str(embedded_checkpoint()),
        help="pipeline folder or Hub id (default: the embedded Push-T model)",
    )
    add(
        "--frames",
        nargs="+",
        metavar="FILE",
        help="image, or video that starts with the history frames; for several cameras one file each, in the order of the "
        "model's `cameras`. Without this config entry the files are stacked vertically; left.mp4,right.mp4 joins two horizontally",
    )
    add("--history", type=int, help="history frames taken from a video (default: the model's maximum)")
    add("--resize", action="store_true", help="resize the frames to the model's size")


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
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
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
        ValueError: If the pipeline or the LoRA weights cannot be loaded, or a flag does not fit the pipeline.
    """
    import torch

    from .. import IRASimPipeline
    from ..devices import default_device, fast_dtype

    device = default_device() if arguments.device == "auto" else arguments.device
    dtype = fast_dtype(device) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if dtype == torch.float16:  # SDXL's autoencoder overflows in float16
        dtype = {"default": dtype, "vae": torch.float32}
    pipeline = load_checked(
        "--model", "a pipeline folder or Hub id", arguments.model, IRASimPipeline, DTYPE_REMEDY, dtype=dtype
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


def load_checked(flag: str, wanted: str, name: str, kind: Any, remedy: str = "", **options: Any) -> Any:
    """Load a model or a pipeline without output, and check its weights.

    Args:
        flag: Flag to name in errors.
        wanted: Expected value, for errors.
        name: Folder or Hub id.
        kind: Class with `from_pretrained`.
        remedy: See `check_weights`.
        options: Options of `from_pretrained`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    try:
        with quiet_loading() as messages:
            loaded = kind.from_pretrained(name, **options)
        check_weights(getattr(loaded, "components", {flag.removeprefix("--"): loaded}), messages, remedy)
    except Exception as error:  # the loaders raise errors of many types for damaged files
        reason = missing_reason(name, error) or error
        raise ValueError(f"{flag} must be {wanted}, got {name!r}: {reason}") from error
    return loaded


def load_vae(name: str) -> AutoencoderKL:
    """Load the autoencoder of `--vae`: a folder or Hub id, optionally with `:<subfolder>`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from diffusers import AutoencoderKL

    from ..training.pretrained import split_subfolder

    folder, subfolder = split_subfolder(name, "--vae")
    wanted = "an AutoencoderKL, a folder or Hub id"
    return load_checked("--vae", wanted, folder, AutoencoderKL, use_safetensors=True, subfolder=subfolder)


def load_reward(name: str, device: Any) -> FrameRegressor:
    """Load the reward model of `--reward`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from ..rewards import FrameRegressor

    return load_checked("--reward", "a FrameRegressor", name, FrameRegressor).eval().to(device)


@contextmanager
def quiet_loading() -> Iterator[list[str]]:
    """Collect the log messages of diffusers; disable its output, warnings and progress bar.

    This keeps the output clean until all checks have passed.
    """
    from diffusers.utils import logging as diffusers_logging

    messages: list[str] = []
    collector = logging.Handler()
    collector.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger, shown = logging.getLogger("diffusers"), diffusers_logging.is_progress_bar_enabled()
    handlers, logger.handlers = logger.handlers, [collector]
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        logger.handlers = handlers
        if shown:
            diffusers_logging.enable_progress_bar()


def check_weights(components: Mapping[str, Any], messages: list[str], remedy: str = "") -> None:
    """Check the weights of loaded models.

    Args:
        components: Components of a pipeline by name.
        messages: Messages of `quiet_loading`.
        remedy: Further remedy for weights that are not finite.

    Raises:
        ValueError: If weights are missing, unknown to the model, NaN (after a training that diverged) or infinite.
    """
    import torch

    from ..pipelines.inputs import find_nonfinite_weight

    for message in messages:
        if "were not used" in message:
            raise ValueError(f"the config does not match the weights: {message}")
    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            for key, weight in component.state_dict().items():
                if weight.is_meta:
                    raise ValueError(f"the weights file does not contain {name}.{key}.")
            if (found := find_nonfinite_weight(component)) is not None:
                raise ValueError(
                    f"weights must be finite, got NaN or infinity in {name}.{found}: use an earlier checkpoint{remedy}."
                )


def _check_steps(scheduler: Any, steps: int) -> None:
    """Raise ValueError if a scheduler has no valid timesteps for a number of steps."""
    from ..pipelines.schedulers import check_warmup

    most = scheduler.config.num_train_timesteps
    if steps > most:
        raise ValueError(f"--steps must be at most {most}, the number of training timesteps, got {steps}.")
    if not hasattr(scheduler, "alphas_cumprod"):
        return
    check_warmup(scheduler, steps)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ValueError(f"--steps {steps} does not fit {type(scheduler).__name__}: {error}") from error
    if scheduler.timesteps.max() >= most:  # `steps_offset` moves the timesteps
        raise ValueError(f"--steps must be less than {steps} for the {type(scheduler).__name__} of this model.")


def frame_files(arguments: argparse.Namespace) -> list[list[Path]]:
    """Return the files of `--frames` in rows, from top to bottom and left to right."""
    return [
        [Path(row)] if Path(row).exists() else [Path(name) for name in row.split(",")]
        for row in arguments.frames or []
    ]


def read_views(rows: list[list[Path]]) -> list[list[np.ndarray]]:
    """Read the frames (T, H, W, 3) of the cameras; without rows, read the embedded clip.

    Raises:
        ValueError: If a file cannot be read.
    """
    for row in rows:
        for path in row:
            check_name("--frames", path)
    return [[read_media(path) for path in row] for row in rows or [[embedded_checkpoint() / "example.mp4"]]]


def tile_views(views: list[list[np.ndarray]], cameras: list[list[str]] | None) -> np.ndarray:
    """Join the frames of several cameras into one video (T, H, W, 3).

    Args:
        views: Frames of each camera, in rows.
        cameras: Camera names of the checkpoint, in rows; None uses the rows of `views`.

    Raises:
        ValueError: If the checkpoint has another number of cameras, or the frames do not form a rectangle.
    """
    from ..data import tile

    flat = [view for row in views for view in row]
    if len(flat) == 1:  # one file, which may already show all cameras
        return flat[0]
    shape = [len(row) for row in cameras or views]
    if sum(shape) != len(flat):
        names = ", ".join(name for row in cameras or [] for name in row)
        raise ValueError(f"--frames must be one file for each camera of the model, {names}, got {len(flat)} files.")
    if len({len(view) for view in flat}) > 1:
        lengths = ", ".join(str(len(view)) for view in flat)
        raise ValueError(f"--frames must have the same number of frames for each camera, got {lengths}.")
    numbers = iter(range(len(flat)))
    layout = tuple(tuple(str(next(numbers)) for _ in range(size)) for size in shape)
    try:
        return tile(layout, {str(number): view for number, view in enumerate(flat)})
    except ValueError as error:
        raise ValueError(f"--frames must form a rectangle when tiled: {error}") from error


def open_start(arguments: argparse.Namespace) -> tuple[IRASimPipeline, np.ndarray, int]:
    """Read the frames and load the pipeline that the flags select. Call `check_sampling_flags` first.

    Returns:
        The pipeline, the video (T, H, W, 3), uint8, and the number of its history frames.

    Raises:
        ValueError: If a file cannot be read, or the flags do not fit the pipeline.
    """
    views = read_views(frame_files(arguments))  # before the model is loaded
    pipeline = load_pipeline(arguments)
    video = tile_views(views, pipeline.transformer.config.get("cameras"))
    return pipeline, video, history_length(arguments, pipeline, len(video))


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
    files = [path for row in frame_files(arguments) for path in row]
    if arguments.history is None and files and all(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return 1
    if num_frames < wanted:
        raise ValueError(
            f"--frames must contain at least {wanted} frames (the history), got {num_frames}: use a longer video, or "
            f"--history {num_frames}."
        )
    return wanted
