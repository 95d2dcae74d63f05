"""Build the noise scheduler of a checkpoint."""

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler


def noise_process(config: Any) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """Build the training noise scheduler from a model config.

    For rectified flow with the positions of Open-Sora, sampling shifts the timesteps toward noise by a factor that grows with
    the number of pixels and frames of a window, as in Open-Sora's RFLOW scheduler. Training does not depend on the shift.
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
