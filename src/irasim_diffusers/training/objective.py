"""Training objective: noise on the predicted frames, a clean history (paper, section 3.3)."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import nn

from ..models import Denoiser, UNetTrajectoryModel
from ..models.moving_layers import Memory


class StateReadout(nn.Module):
    """A model with an auxiliary linear readout of the true state from its intermediate features.

    If an object is predicted in the wrong place, the pixel error barely depends on the direction of the correction. The
    error of a predicted position does. The readout is used only in training and is dropped afterward. It aligns features as
    in REPA (https://arxiv.org/abs/2410.06940), with known states as targets.

    Args:
        transformer: The model to train. The state is read from the output of the temporal block at three quarters of the depth,
            or from the middle block of a U-Net.
        num_components: Number of state components.
    """

    def __init__(self, transformer: Denoiser, num_components: int) -> None:
        super().__init__()
        self._no_split_modules = transformer._no_split_modules  # read by FSDP
        config = transformer.config
        self.is_unet = isinstance(transformer, UNetTrajectoryModel)
        if self.is_unet:
            block, dim = transformer.mid_block, config.block_out_channels[-1]
        else:
            block = transformer.temporal_transformer_blocks[(3 * config.num_layers - 1) // 4]
            dim = config.num_attention_heads * config.attention_head_dim
        self.transformer = transformer
        self.readout = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_components))
        self.features: list[torch.Tensor] = []
        block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.features = [output]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the model and the state of each frame (B, F, S)."""
        outputs = self.transformer(*args, **kwargs | {"return_dict": False})
        features = self.features.pop().float()
        if self.is_unet:  # (B F, D, H, W) to (B, F, H W, D), as in a transformer
            features = features.flatten(2).mT.unflatten(0, (-1, outputs[0].shape[2]))
        return *outputs, self.readout(features.mean(2))


NoiseProcess: TypeAlias = DDPMScheduler | FlowMatchEulerDiscreteScheduler


def add_noise(
    scheduler: NoiseProcess, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Add noise to latents at the given timesteps; a flow interpolates linearly between latents and noise."""
    if isinstance(scheduler, DDPMScheduler):
        return scheduler.add_noise(latents, noise, timesteps)
    share = (timesteps / scheduler.config.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1)).to(latents)
    return (1 - share) * latents + share * noise


def diffusion_target(
    scheduler: NoiseProcess, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return the regression target of the scheduler's `prediction_type`.

    For a flow, it is the velocity `noise - latents`.

    Raises:
        ValueError: If the prediction type is not epsilon, v_prediction or sample.
    """
    if not isinstance(scheduler, DDPMScheduler):
        return noise - latents
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(latents, noise, timesteps)
        case "sample":
            return latents
        case other:
            raise ValueError(f"`prediction_type` must be epsilon, v_prediction or sample, got {other!r}.")


def min_snr_weights(scheduler: NoiseProcess, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return min-SNR loss weights (B,), https://arxiv.org/abs/2303.09556.

    Raises:
        ValueError: If the noise process is a flow.
    """
    if not isinstance(scheduler, DDPMScheduler):
        raise ValueError(f"`snr_gamma` must be None for flow matching, which has no min-SNR weights, got {gamma}.")
    snr = compute_snr(scheduler, timesteps)
    capped = snr.clamp_max(gamma)
    return {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[
        scheduler.config.prediction_type
    ]


def diffusion_loss(
    transformer: torch.nn.Module,
    scheduler: NoiseProcess,
    latents: torch.Tensor,
    actions: torch.Tensor,
    *,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    action_mask: torch.Tensor | None = None,
    relative_latents: bool = False,
    moving_layers: bool = False,
    memory: Memory | None = None,
    states: torch.Tensor | None = None,
    state_loss_weight: float = 1.0,
    snr_gamma: float | None = None,
    huber_c: float | None = None,
) -> dict[str, torch.Tensor]:
    """Compute the mean squared or pseudo-Huber error of the predicted frames (paper, section 3.3).

    Args:
        transformer: The model, possibly wrapped by accelerate; a `StateReadout` if `states` are given.
        scheduler: The model's noise process, from `models.noise_process`.
        latents: Scaled latents (B, C, F, H, W), history first.
        actions: Actions (B, n, A) in raw units; the first F - n frames are history.
        timesteps: Diffusion timesteps (B,).
        noise: Gaussian noise (B, C, n, H, W).
        action_mask: Booleans (B, n); actions at False are replaced by the null action.
        relative_latents: Whether predicted latents are relative to the last history frame, as in the model's config.
        moving_layers: Whether the model has moving layers; the error is then the mean of those of its two predictions.
        memory: With moving layers, the memory after the history in a rollout.
        states: True states (B, F, S) with unit variance, for the readout, whose error is added.
        state_loss_weight: Weight of the mean squared error of the readout.
        snr_gamma: Gamma of `min_snr_weights`, for example 5; None for equal weights.
        huber_c: Scale c of the pseudo-Huber loss (https://arxiv.org/abs/2310.14189, section 3.3); None for the squared error.

    Returns:
        Float32 scalars: `loss`, to be minimized, and its parts: with moving layers `loss_moved` and `loss_generated`, with
        states `loss_states`, before it is weighted.

    Raises:
        ValueError: If `snr_gamma` is given for a flow, or the prediction type is unknown.
    """
    history, future = latents.tensor_split([latents.shape[2] - actions.shape[1]], dim=2)
    if relative_latents:
        future = future - history[:, :, -1:]
    window = torch.cat([history, add_noise(scheduler, future, noise, timesteps)], dim=2)
    options: dict[str, Any] = {"return_components": True, "memory": memory} if moving_layers else {}
    outputs = transformer(window, timesteps, actions, action_mask=action_mask, return_dict=False, **options)
    target = diffusion_target(scheduler, future, noise, timesteps)
    predictions = outputs[1:3] if moving_layers else (outputs[0][:, :, history.shape[2] :],)
    errors = _errors(torch.stack(predictions, dim=1), target.unsqueeze(1), huber_c)  # (B, 1 or 2)
    if snr_gamma is not None:
        errors = errors * min_snr_weights(scheduler, timesteps, snr_gamma).unsqueeze(1)
    losses = {"loss": errors.mean()}
    if moving_layers:
        losses["loss_moved"], losses["loss_generated"] = errors.mean(0)
    if states is not None:
        losses["loss_states"] = (outputs[-1] - states).square().mean()
        losses["loss"] = losses["loss"] + state_loss_weight * losses["loss_states"]
    return losses


def _errors(predictions: torch.Tensor, targets: torch.Tensor, huber_c: float | None) -> torch.Tensor:
    """Return the mean squared or pseudo-Huber errors (B, P) of predictions (B, P, C, n, H, W)."""
    errors = (predictions.float() - targets.float()).square()
    if huber_c is not None:
        errors = 2 * huber_c * ((errors + huber_c**2).sqrt() - huber_c)
    return errors.flatten(2).mean(2)
