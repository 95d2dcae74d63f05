"""The training objective: noise on predicted frames, clean history, loss on predicted frames only."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler


def diffusion_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network shall predict, by the scheduler's `prediction_type`.

    Raises:
        ValueError: If the prediction type is none of epsilon, v_prediction and sample.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(latents, noise, timesteps)
        case "sample":
            return latents
        case other:
            raise ValueError(f"`prediction_type` must be epsilon, v_prediction or sample, got {other!r}.")


def diffusion_loss(
    transformer: torch.nn.Module,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    actions: torch.Tensor,
    *,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    action_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error on the predicted frames (paper, section 3.3).

    Args:
        transformer: The model, or a wrapper of it.
        scheduler: Its noise process, from `models.noise_process`.
        latents: Scaled latents (B, C, F, H, W), the clean history first.
        actions: Actions (B, n, A) in raw units; the first F - n frames are history.
        timesteps: Diffusion timesteps (B,).
        noise: Noise (B, C, n, H, W).
        action_mask: Booleans (B, n); actions at False are dropped.

    Returns:
        The loss, a scalar in float32.
    """
    num_history_frames = latents.shape[2] - actions.shape[1]
    history, future = latents[:, :, :num_history_frames], latents[:, :, num_history_frames:]
    noisy = scheduler.add_noise(future, noise, timesteps)
    prediction = transformer(
        torch.cat([history, noisy], dim=2), timesteps, actions, action_mask=action_mask, return_dict=False
    )[0][:, :, num_history_frames:]
    target = diffusion_target(scheduler, future, noise, timesteps)
    return (prediction.float() - target.float()).square().mean()
