"""Use of any diffusers scheduler with a checkpoint: checks, exchange, timesteps and prediction types."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..models import noise_process

WITHOUT_SAMPLE = ("PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers that do not support predicted samples; with `v_prediction` the pipeline converts samples for them."""

PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
"""Config entries of the noise process."""


def exchange(scheduler: Any, kind: str | type[SchedulerMixin], config: Any, **changes: Any) -> Any:
    """Build a scheduler of a given class with the noise process of the current one.

    Args:
        scheduler: The current scheduler.
        kind: Class of the new scheduler, or its name in diffusers.
        config: The transformer's config.
        changes: Entries of the new scheduler's config.

    Returns:
        The new scheduler.

    Raises:
        ValueError: If the class or an entry is unknown, or the scheduler does not fit the checkpoint.
    """
    found = getattr(diffusers, kind, None) if isinstance(kind, str) else kind
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin):
        raise ValueError(
            f"`scheduler` must be a scheduler class of diffusers or its name, such as 'DDIMScheduler', got {kind!r:.80}."
        )
    scheduler_class: Any = found
    known = list(inspect.signature(scheduler_class.__init__).parameters)[1:]
    if unknown := sorted(changes.keys() - set(known)):
        raise ValueError(f"the config of {found.__name__} has no entries {unknown}; its entries are {sorted(known)}.")
    settings: dict[str, Any] = {}
    is_other = not isinstance(scheduler, found)
    if config.prediction_type == "sample" and (is_other or found.__name__ in WITHOUT_SAMPLE):
        settings["prediction_type"] = "v_prediction"  # every scheduler supports it; the pipeline converts samples
    if is_other and "clip_sample" in known:  # PNDM has no such entry
        settings["clip_sample"] = False
    new = scheduler_class.from_config(scheduler.config, **settings | changes)
    check_scheduler(new, config)
    return new


def check_scheduler(scheduler: Any, config: Any) -> None:
    """Check that a scheduler fits the checkpoint.

    Args:
        scheduler: The scheduler.
        config: The transformer's config.

    Raises:
        ValueError: If the prediction type or the noise process differs from the checkpoint's, or the scheduler clips samples,
            does not support predicted samples or a given generator, or has an invalid `steps_offset`.
    """
    name = type(scheduler).__name__
    found = getattr(scheduler.config, "prediction_type", None)
    is_flow = hasattr(scheduler, "scale_noise") or getattr(scheduler.config, "use_flow_sigmas", False)
    if config.prediction_type == "flow_prediction":
        number = getattr(scheduler.config, "num_train_timesteps", None)
        if not is_flow or found not in (None, "flow_prediction") or number != config.num_train_timesteps:
            raise ValueError(
                f"`scheduler` must use rectified flow with num_train_timesteps={config.num_train_timesteps}, like the checkpoint, "
                f"got {name} with prediction_type={found!r} and num_train_timesteps={number}: use "
                "`irasim_diffusers.models.noise_process(pipe.transformer.config)`."
            )
        return
    settings = ", ".join(f"{key}={config[key]!r}" for key in PROCESS)
    remedy = _remedy(name, config.prediction_type, settings)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None or is_flow:
        raise ValueError(
            f"`scheduler` must have the checkpoint's noise process ({settings}), got {name} with a flow or continuous "
            "process: use a scheduler with betas and without `use_flow_sigmas`."
        )
    if name == "DPMSolverSDEScheduler":
        raise ValueError(f"`scheduler` must draw its noise from the given generator, which {name} does not support.")
    if found != config.prediction_type and (config.prediction_type, found) != ("sample", "v_prediction"):
        raise ValueError(
            f"`scheduler` must have the checkpoint's prediction type {config.prediction_type!r}, got {name} with {found!r}: "
            f"{remedy}"
        )
    if found == "sample" and name in WITHOUT_SAMPLE:
        raise ValueError(
            f"`scheduler` must support predicted samples, which {name} does not: {remedy} The pipeline then "
            "converts the predicted samples."
        )
    offset = getattr(scheduler.config, "steps_offset", 0)
    if not isinstance(offset, int) or not 0 <= offset < config.num_train_timesteps:
        raise ValueError(
            f"`steps_offset` of the scheduler must be an integer in [0, {config.num_train_timesteps}), got {offset!r}."
        )
    trained = noise_process(config).alphas_cumprod
    alphas_cumprod = alphas_cumprod.cpu().float()
    if alphas_cumprod.shape != trained.shape or not torch.allclose(alphas_cumprod, trained, atol=1e-6):
        raise ValueError(
            f"`scheduler` must have the checkpoint's noise process ({settings}), got {name} with other betas: {remedy}"
        )
    if getattr(scheduler.config, "clip_sample", False):
        raise ValueError(
            f"`scheduler` must not clip samples, got {name} with clip_sample=True: latents exceed [-1, 1]; {remedy}"
        )


def _remedy(name: str, prediction_type: str, settings: str) -> str:
    """Describe how to create a scheduler for a checkpoint with this prediction type and noise process."""
    if prediction_type == "sample" and name in WITHOUT_SAMPLE:
        prediction_type = "v_prediction"
    entries = f"prediction_type={prediction_type!r}, {settings}, clip_sample=False"
    return f"create it with `{name}.from_config(pipe.scheduler.config, {entries})`."


def check_warmup(scheduler: Any, num_inference_steps: int) -> None:
    """Check the number of steps against the Runge-Kutta warm-up of PNDM.

    Raises:
        ValueError: If there are fewer than 4 steps with the warm-up.
    """
    if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps and num_inference_steps < 4:
        raise ValueError(
            "`num_inference_steps` must be at least 4 for PNDMScheduler with its Runge-Kutta warm-up, got "
            f"{num_inference_steps}: use more steps, or another scheduler."
        )


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: list[int] | None,
    sigmas: list[float] | None,
    *,
    preferred: list[int] | None,
    is_flow: bool,
    device: torch.device,
) -> torch.Tensor:
    """Set the timesteps of a scheduler.

    Args:
        scheduler: The scheduler.
        num_inference_steps: Number of steps, if neither `timesteps` nor `sigmas` is given.
        timesteps: Custom timesteps, for schedulers that accept them.
        sigmas: Custom sigmas, for schedulers that accept them.
        preferred: Timesteps of the checkpoint, used if `num_inference_steps` is their number and the scheduler accepts timesteps.
            None for the scheduler's spacing.
        is_flow: Whether the model predicts a flow; its sigmas are linear.
        device: Device of the timesteps.

    Returns:
        The timesteps.

    Raises:
        ValueError: If both `timesteps` and `sigmas` are given, the scheduler does not accept them, or a timestep is too large.
    """
    given = {"timesteps": timesteps, "sigmas": sigmas}
    custom: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if len(custom) > 1 or not custom.keys() <= accepted.keys():
        raise ValueError(
            f"`timesteps` and `sigmas` are mutually exclusive and must be supported by `set_timesteps` of the scheduler, got "
            f"{sorted(custom)} for {type(scheduler).__name__}."
        )
    if not custom and preferred and len(preferred) == num_inference_steps and "timesteps" in accepted:
        custom = {"timesteps": preferred}
    elif not custom and "sigmas" in accepted and is_flow:
        custom = {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)}
    scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device=device)
    most = scheduler.config.num_train_timesteps
    if hasattr(scheduler, "alphas_cumprod") and scheduler.timesteps.max() >= most:
        raise ValueError(
            f"the timesteps of {type(scheduler).__name__} must be less than {most}, got {scheduler.timesteps.max().item()}: use "
            "smaller `timesteps`, fewer steps or a smaller `steps_offset`."
        )
    return scheduler.timesteps


def step_arguments(scheduler: Any, **arguments: Any) -> dict[str, Any]:
    """Return the given arguments that the scheduler's `step` accepts."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in arguments.items() if name in accepted}


def convert_sample(scheduler: Any, sample: torch.Tensor, noisy: torch.Tensor, timestep: float) -> torch.Tensor:
    """Convert a predicted sample to the prediction type of the scheduler, sample or velocity."""
    if scheduler.config.prediction_type == "sample":
        return sample
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu().numpy()
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    sigma = float(np.interp(timestep, np.arange(len(sigmas)), sigmas))  # interpolated as in the sigma schedulers
    alpha = (1 + sigma**2) ** -0.5
    return (alpha * noisy - sample) / (alpha * sigma)
