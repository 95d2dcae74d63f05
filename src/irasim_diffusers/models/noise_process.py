"""The noise process a checkpoint was trained on."""

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler


def noise_process(config: Any) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The noise process that a transformer's config records, as a scheduler to train with and compare against."""
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
    )
