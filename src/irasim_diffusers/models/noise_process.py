"""The noise process a checkpoint was trained on."""

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler


def noise_process(config: Any) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The noise process that a network's config records, as a scheduler to train with and compare against.

    A rectified flow of Open-Sora's layout is sampled with its shift towards noise, which grows with the pixels and frames of a
    window (its RFLOW scheduler); training does not depend on it.
    """
    if config.prediction_type == "flow_prediction":
        shift = 1.0
        if config.get("spatial_position") == "area":
            pixels = 64 * config.sample_height * config.sample_width
            shift = (pixels / 512**2) ** 0.5 * config.sample_frames**0.5
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=shift)
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
    )
