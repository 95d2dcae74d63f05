"""The loss of a batch of clips, with draws that do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.moving_layers import Memory
from .arguments import RunArguments
from .objective import NoiseProcess, diffusion_loss
from .rollouts import crop, predict_chunk

FULL_HISTORY = 0.7
"""Probability that a step uses the maximum number of history frames without a draw.

Otherwise, the number is drawn uniformly from 1 to the maximum. Video-Ada and the U-Net always use the maximum.
"""
TRUE_HISTORY = 0.3
"""Fraction of clips that keep the true history in a rollout step."""


def training_loss(
    model: nn.Module,
    noise_scheduler: NoiseProcess,
    clip: dict[str, torch.Tensor],
    config: Any,
    arguments: RunArguments,
    step: int,
    position: int,
) -> dict[str, torch.Tensor]:
    """Compute the losses of a batch of clips.

    The numbers of history frames, chunks and predicted frames depend only on the seed and the step; noise, timesteps and action
    dropout only on the seed and the index of the clip in the run. None of them depends on the number of processes.

    Args:
        model: The model, possibly wrapped by accelerate; a `StateReadout` with `state_keys`.
        noise_scheduler: The model's noise process, from `models.noise_process`.
        clip: `latents` (B, C, F, H, W), scaled; `actions` (B, F - 1, A) in raw units; `states` (B, F, S) with `state_keys`.
        config: Config of the model.
        arguments: Arguments of the run.
        step: Number of completed steps.
        position: Index of the first clip of the batch in the run.

    Returns:
        The losses, as from `diffusion_loss`.
    """
    latents, actions = clip["latents"], clip["actions"]
    most = config["num_history_frames"]
    num_history, chunks, length = _draw_lengths(config, arguments, step)
    draw = _draws(arguments.seed, position, len(latents), latents.device)
    uniform = draw(0, 8)
    (timestep, terminal, deviation, drop, true_history), places = uniform[:, :5].unbind(1), uniform[:, 5:]
    first = most + chunks * (config["sample_frames"] - most)  # index of the first frame with a loss
    if arguments.crop_size:
        latents, actions = latents[:, :, : first + length], actions[:, : first + length - 1]
        latents, actions = crop(latents, actions, config, arguments.crop_size, places)
    is_true = true_history < TRUE_HISTORY
    inputs = (latents, actions, is_true, config, arguments, num_history, chunks, draw)
    history, memory = _predict_history(model, noise_scheduler, *inputs)
    start, end, clean = first - history.shape[2], first + length, history.shape[2]
    window, actions = torch.cat([history, latents[:, :, first:end]], dim=2), actions[:, first - 1 : end - 1]
    noise = draw(1, *window.shape[1:], normal=True)
    window[:, :, :clean] += arguments.history_noise * deviation.view(-1, 1, 1, 1, 1) * noise[:, :, :clean]
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.where(terminal < arguments.terminal_share, steps - 1, (timestep * steps).long())
    return diffusion_loss(
        *(model, noise_scheduler, window, actions),
        timesteps=timesteps.clamp_max(steps - 1),
        noise=noise[:, :, clean:],
        action_mask=(drop >= arguments.action_dropout)[:, None].expand(-1, length),
        relative_latents=config["relative_latents"],
        moving_layers=config.get("moving_layers", 0) > 0,
        memory=memory or None,
        states=clip["states"][:, start:end] if arguments.state_keys else None,
        state_loss_weight=arguments.state_loss_weight,
        snr_gamma=arguments.snr_gamma,
        huber_c=arguments.huber_c,
    )


def _predict_history(
    model: nn.Module,
    noise_scheduler: NoiseProcess,
    latents: torch.Tensor,
    actions: torch.Tensor,
    is_true: torch.Tensor,
    config: Any,
    arguments: RunArguments,
    num_history: int,
    chunks: int,
    draw: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, Memory]:
    """Return history (B, C, h, H, W) and memory of the model after the first `chunks` of each clip.

    The clips for which `is_true` (B,) have the true history and an empty memory; the history of the others is predicted.
    """
    most = config["num_history_frames"]
    length = config["sample_frames"] - most  # length of a chunk
    history = latents[:, :, most - num_history : most]
    shape = (latents.shape[1], length, *latents.shape[3:])
    memory: Memory = {}
    for chunk in range(chunks):
        first = most + chunk * length
        options: dict[str, Any] = {"memory": memory} if memory else {}
        if arguments.motion_noise:
            motions = draw(2 + arguments.rollout_chunks + chunk, config["moving_layers"], 3, normal=True)
            options["motion_noise"] = arguments.motion_noise * motions
        future, memory = predict_chunk(
            model,
            noise_scheduler,
            history,
            actions[:, first - 1 : first - 1 + length],
            draw(2 + chunk, *shape, normal=True),
            num_inference_steps=arguments.rollout_inference_steps,
            relative_latents=config["relative_latents"],
            moving_layers=config.get("moving_layers", 0) > 0,
            **options,
        )
        history = torch.cat([history, future.to(history)], dim=2)[:, :, -most:]
    torch.clear_autocast_cache()  # before torch 2.11, this cache keeps weights that were cast without gradient
    first = most + chunks * length
    history = torch.where(is_true.view(-1, 1, 1, 1, 1), latents[:, :, first - history.shape[2] : first], history)
    return history, {name: tensor * ~is_true.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in memory.items()}


def _draw_lengths(config: Any, arguments: RunArguments, step: int) -> tuple[int, int, int]:
    """Draw the numbers of history frames, chunks without gradient, and frames with a loss of a step."""
    rng = np.random.default_rng([arguments.seed, 0, step])
    num_history = config["num_history_frames"]
    length = config["sample_frames"] - num_history
    varies = config["conditioning"] == "frame"  # Video-Ada and the U-Net have fixed numbers
    if varies and rng.random() >= FULL_HISTORY:
        num_history = int(rng.integers(1, num_history + 1))
    chunks = int(rng.integers(0, arguments.rollout_chunks + 1)) if step >= arguments.rollout_start_step else 0
    if varies and length > 1 and rng.random() < arguments.short_chunk_share:
        length = int(rng.integers(1, length))
    return num_history, chunks, length


def _draws(seed: int, position: int, batch_size: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """Return a function that draws random numbers (B, ...), independently for each clip and `kind`."""

    def draw(kind: int, *shape: int, normal: bool = False) -> torch.Tensor:
        generators = [np.random.default_rng([seed, 1, position + index, kind]) for index in range(batch_size)]
        drawn = [
            each.standard_normal(shape, np.float32) if normal else each.random(shape, np.float32)
            for each in generators
        ]
        return torch.from_numpy(np.stack(drawn)).to(device)

    return draw
