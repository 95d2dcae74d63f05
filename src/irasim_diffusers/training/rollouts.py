"""Windows for training on predicted histories, and crops around patches that change."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ..models.moving_layers import Memory
from .objective import NoiseProcess


def clip_length(config: Any, rollout_chunks: int) -> int:
    """Return the number of frames of a clip: history, chunks without gradient, and a chunk with the loss."""
    history = config["num_history_frames"]
    return history + (rollout_chunks + 1) * (config["sample_frames"] - history)


@torch.no_grad()
def predict_chunk(
    transformer: torch.nn.Module,
    scheduler: NoiseProcess,
    history: torch.Tensor,
    actions: torch.Tensor,
    noise: torch.Tensor,
    *,
    num_inference_steps: int = 1,
    relative_latents: bool = False,
    moving_layers: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, Memory]:
    """Sample the frames of one chunk with a model in training, without gradients.

    Args:
        transformer: The model, possibly wrapped by accelerate or a `StateReadout`.
        scheduler: The model's noise process, from `models.noise_process`. Sampling uses DDIM with trailing timesteps, or Euler
            steps for flow matching.
        history: Clean latents (B, C, h, H, W).
        actions: Actions (B, n, A) in raw units.
        noise: Noise (B, C, n, H, W).
        num_inference_steps: Denoising steps.
        relative_latents: Whether predicted latents are relative to the last history frame, as in the model's config.
        moving_layers: Whether the model has moving layers.
        options: Other arguments of the model, such as `motion_noise` and `memory`.

    Returns:
        Latents (B, C, n, H, W), float32, and with moving layers the memory after them, otherwise an empty one.
    """
    sampler: Any = scheduler
    if isinstance(scheduler, DDPMScheduler):
        sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        sampler.set_timesteps(num_inference_steps)
    else:
        sampler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        sampler.set_timesteps(sigmas=torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist())
    sample = noise
    memory: Memory = {}
    for timestep in sampler.timesteps:
        window = torch.cat([history, sample], dim=2)
        output, *others = transformer(
            window, timestep.to(history.device).expand(len(history)), actions, return_dict=False, **options
        )
        memory = others[0] if moving_layers else {}
        sample = sampler.step(output[:, :, history.shape[2] :].float(), timestep, sample, return_dict=False)[0]
    return sample + history[:, :, -1:] if relative_latents else sample, memory


def crop(
    latents: torch.Tensor, actions: torch.Tensor, config: Any, size: int, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the same square out of all frames of a clip, around a patch that changes in the last frame.

    Args:
        latents: Latents of the clips (B, C, F, H, W).
        actions: Raw actions (B, n, A). Targets are shifted by the crop offset if the model has `target_extent`.
        config: The model's config.
        size: Side of the squares, in latent pixels, a multiple of the patch size.
        draws: Uniform numbers (B, 3) in [0, 1) that select the patch and its position in the square.

    Returns:
        Latents (B, C, F, size, size) and actions (B, n, A).
    """
    patch = config["patch_size"]
    change = (latents[:, :, -1] - latents[:, :, -2]).abs().sum(1)
    weights = torch.nn.functional.avg_pool2d(change, patch)  # (B, rows, columns)
    rows, columns = weights.shape[1:]
    shares = (weights.flatten(1) + 1e-6).cumsum(1)
    chosen = torch.searchsorted(shares / shares[:, -1:], draws[:, :1].contiguous()).clamp_max(rows * columns - 1)[:, 0]
    side = size // patch
    corners = []
    for place, number, draw in ((chosen // columns, rows, draws[:, 1]), (chosen % columns, columns, draws[:, 2])):
        corners.append((place - (draw * side).long()).clamp(0, number - side) * patch)
    pieces = [
        window[..., top : top + size, left : left + size]
        for window, top, left in zip(latents, corners[0].tolist(), corners[1].tolist(), strict=True)
    ]
    if config["target_extent"] is not None:
        left, top, right, bottom = config["target_extent"]
        moved = [
            (right - left) / config["sample_width"] * corners[1],
            (bottom - top) / config["sample_height"] * corners[0],
        ]
        shift = torch.nn.functional.pad(torch.stack(moved, dim=1), (0, actions.shape[2] - 2))
        actions = actions - shift[:, None].to(actions)
    return torch.stack(pieces), actions
