"""Build the pipeline of a trained model."""

from __future__ import annotations

from typing import Any, TypeAlias

import diffusers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from ..latents import Autoencoder
from ..models import Denoiser, noise_process
from ..pipelines import IRASimPipeline
from ..pipelines.pipeline_irasim import SETTINGS
from .pretrained import is_pipeline

Sampler: TypeAlias = tuple[Any, dict[str, Any]]
"""A scheduler, and the arguments of `IRASimPipeline` that belong to it."""


def make_pipeline(
    vae: Autoencoder | None,
    transformer: Denoiser,
    scheduler_class: Any = PNDMScheduler,
) -> IRASimPipeline:
    """Build a pipeline with the default sampler of the model.

    Args:
        vae: Autoencoder; None for pixel space.
        transformer: The model.
        scheduler_class: Class of the sampler; ignored for flow models (Euler steps) and for models with
            `scale_noisy_latents` (one DDIM step).
    """
    process = noise_process(transformer.config)
    if isinstance(process, FlowMatchEulerDiscreteScheduler):
        return IRASimPipeline(vae, transformer, process)
    if transformer.config.get("scale_noisy_latents"):
        scheduler = DDIMScheduler.from_config(process.config, timestep_spacing="trailing")
        return IRASimPipeline(vae, transformer, scheduler, num_inference_steps=1)
    extra: dict[str, Any] = {"skip_prk_steps": True}
    if scheduler_class is not PNDMScheduler:
        extra = {"timestep_spacing": "trailing"}  # with few steps, sampling then starts from pure noise
    if transformer.config.prediction_type == "sample":
        extra["prediction_type"] = "v_prediction"  # PNDM does not support sample prediction; the pipeline converts it
    scheduler = scheduler_class.from_config(process.config, steps_offset=1, set_alpha_to_one=False, **extra)
    return IRASimPipeline(vae, transformer, scheduler)


def load_sampler(pretrained: str | None, revision: str | None = None) -> Sampler | None:
    """Load the scheduler and the settings of a pretrained pipeline.

    The result is None for a new model or a bare transformer.

    Args:
        pretrained: Folder or Hub id of the pretrained pipeline or transformer; None for a new model.
        revision: Revision of the pretrained pipeline.

    Raises:
        ValueError: If `pretrained` cannot be accessed, or its scheduler is not a class of diffusers.
        OSError: If the config of the scheduler cannot be read.
    """
    if pretrained is None or not is_pipeline(pretrained, revision):
        return None
    known = IRASimPipeline.load_config(pretrained, revision=revision)
    name = known["scheduler"][1]
    if not hasattr(diffusers, name):
        raise ValueError(f"the scheduler of {pretrained!r} must be a class of diffusers, got {name!r}.")
    scheduler = getattr(diffusers, name).from_pretrained(pretrained, subfolder="scheduler", revision=revision)
    return scheduler, {key: known[key] for key in SETTINGS if key in known}


def finished_pipeline(
    vae: Autoencoder | None,
    transformer: Denoiser,
    sampler: Sampler | None = None,
) -> IRASimPipeline:
    """Build the pipeline of a trained model, with the pretrained pipeline's sampler if it still fits.

    Args:
        vae: Autoencoder; None for pixel space.
        transformer: The trained model.
        sampler: Scheduler and settings of the pretrained pipeline, from `load_sampler`; None for the default ones.
    """
    pipeline = make_pipeline(vae, transformer)
    if sampler is None:
        return pipeline
    scheduler, settings = sampler
    longest = transformer.config.sample_frames - transformer.config.num_history_frames
    if (settings.get("chunk_length") or 0) > longest:  # the window has become shorter
        settings = settings | {"chunk_length": None}
    sampled = IRASimPipeline(pipeline.vae, transformer, scheduler, **settings)
    try:
        sampled.check_scheduler()
    except ValueError:  # the prediction type or the noise process has changed
        return pipeline
    return sampled
