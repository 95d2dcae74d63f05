"""The training objective, noise on predicted frames with a clean history, and checkpoints of a run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel, compute_snr
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .models import IRASimTransformer3DModel, UNetTrajectoryModel

FINISHED = ".finished"
"""Folder in which a run puts its result together, hidden, so that it is nobody else's."""

SETTINGS = "settings.json"
"""File of a checkpoint that holds what its run must keep."""


class StateReadout(nn.Module):
    """A network in training, with a linear readout of the true state from features halfway through it.

    Frames in which an object lies elsewhere than predicted overlap little with the truth, so that their error hardly
    says which way to move it; the error of a read-out position does. The readout shapes the features in training and is
    dropped afterwards (an alignment of inner features as in REPA, https://arxiv.org/abs/2410.06940, to known states).

    Args:
        transformer: The model to train. The state is read after the pair of blocks in the middle of a transformer's later half,
            and after the middle of a U-Net, where pixels are fewest.
        num_components: Components of the state.
    """

    def __init__(self, transformer: IRASimTransformer3DModel | UNetTrajectoryModel, num_components: int) -> None:
        super().__init__()
        self._no_split_modules = transformer._no_split_modules  # what FSDP wraps
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

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's prediction (B, C, F, H, W) and the state read from each frame (B, F, S)."""
        prediction = self.transformer(*args, **kwargs | {"return_dict": False})[0]
        features = self.features.pop().float()
        if self.is_unet:  # (B F, D, H, W) to (B, F, S, D), as a transformer's
            features = features.flatten(2).mT.unflatten(0, (-1, prediction.shape[2]))
        return prediction, self.readout(features.mean(2))


NoiseProcess: TypeAlias = DDPMScheduler | FlowMatchEulerDiscreteScheduler


def add_noise(
    scheduler: NoiseProcess, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Latents at the given timesteps; a flow runs straight from the latents at 0 to the noise at the last."""
    if isinstance(scheduler, DDPMScheduler):
        return scheduler.add_noise(latents, noise, timesteps)
    share = (timesteps / scheduler.config.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1)).to(latents)
    return (1 - share) * latents + share * noise


def diffusion_target(
    scheduler: NoiseProcess, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network shall predict, by the scheduler's `prediction_type`; the velocity `noise - latents` of a flow.

    Raises:
        ValueError: If the prediction type is none of epsilon, v_prediction and sample.
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
    """Weights (B,) that cap the weight of a sample's error at the signal-to-noise ratio `gamma`.

    Raises:
        ValueError: For a flow, which has no such weights.
    """
    if not isinstance(scheduler, DDPMScheduler):
        raise ValueError("`snr_gamma` must be None for a flow: its noise process has no signal-to-noise weights.")
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
    states: torch.Tensor | None = None,
    state_loss_weight: float = 1.0,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error on the predicted frames (paper, section 3.3).

    Args:
        transformer: The model, or a wrapper of it; with `states`, a `StateReadout` or a wrapper of one.
        scheduler: Its noise process, from `models.noise_process`.
        latents: Scaled latents (B, C, F, H, W), the clean history first.
        actions: Actions (B, n, A) in raw units; the first F - n frames are history.
        timesteps: Diffusion timesteps (B,).
        noise: Noise (B, C, n, H, W).
        action_mask: Booleans (B, n); actions at False are dropped.
        relative_latents: As in the model's config: predict the latents relative to the last history frame.
        states: True states (B, F, S), of unit variance, for the readout.
        state_loss_weight: Weight of the readout's mean squared error.
        snr_gamma: Weigh timesteps by min-SNR with this gamma (https://arxiv.org/abs/2303.09556), 5 in its paper; None for
            equal weights. A flow has none.

    Returns:
        The loss, a scalar in float32.
    """
    num_history_frames = latents.shape[2] - actions.shape[1]
    history, future = latents[:, :, :num_history_frames], latents[:, :, num_history_frames:]
    if relative_latents:
        future = future - history[:, :, -1:]
    noisy = add_noise(scheduler, future, noise, timesteps)
    outputs = transformer(
        torch.cat([history, noisy], dim=2), timesteps, actions, action_mask=action_mask, return_dict=False
    )
    target = diffusion_target(scheduler, future, noise, timesteps)
    errors = (outputs[0][:, :, num_history_frames:].float() - target.float()).square().mean(dim=(1, 2, 3, 4))
    if snr_gamma is not None:
        errors = errors * min_snr_weights(scheduler, timesteps, snr_gamma)
    loss = errors.mean()
    if states is not None:
        loss = loss + state_loss_weight * (outputs[1] - states).square().mean()
    return loss


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
) -> torch.Tensor:
    """Sample the frames of one chunk with a model in training, without gradients.

    Args:
        transformer: The model, or a wrapper of it such as a `StateReadout`.
        scheduler: Its noise process, from `models.noise_process`. Sampling uses DDIM with trailing timesteps, or Euler steps for
            a flow.
        history: Clean latents (B, C, h, H, W).
        actions: Actions (B, n, A) in raw units.
        noise: Noise (B, C, n, H, W).
        num_inference_steps: Denoising steps.
        relative_latents: As in the model's config.

    Returns:
        Latents (B, C, n, H, W), float32.
    """
    sampler: Any = scheduler
    if isinstance(scheduler, DDPMScheduler):
        sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        sampler.set_timesteps(num_inference_steps)
    else:
        sampler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        sampler.set_timesteps(sigmas=torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist())
    sample = noise
    for timestep in sampler.timesteps:
        window = torch.cat([history, sample], dim=2)
        output = transformer(window, timestep.to(history.device).expand(len(history)), actions, return_dict=False)[0]
        sample = sampler.step(output[:, :, history.shape[2] :].float(), timestep, sample, return_dict=False)[0]
    return sample + history[:, :, -1:] if relative_latents else sample


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints `checkpoint-<step>` in a folder, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_checkpoint(output: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, None where there is none.

    Args:
        output: Folder of the checkpoints.
        settings: What this run must keep to be the same run; values may be dictionaries.

    Raises:
        ValueError: If another run wrote it; names every setting that is another one now.
    """
    found = checkpoints(output)
    if not found:
        return None
    before = _flat(json.loads((found[-1] / SETTINGS).read_text()))
    now = _flat(json.loads(json.dumps(settings)))  # which knows lists for tuples
    changed = [
        f"{key} was {before.get(key)!r} and is {value!r}" for key, value in now.items() if before.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{str(found[-1])!r} is of another run: {', '.join(changed)}. Undo that, or take another `output_dir`."
        )
    return found[-1]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    step: int,
    limit: int,
    settings: dict[str, Any],
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint under a temporary name, rename it, and drop the oldest beyond `limit`.

    Args:
        accelerator: Its state is saved; every process must call this.
        output: Folder of the checkpoints.
        step: Number of the step that is done.
        limit: Most checkpoints to keep.
        settings: What `newest_checkpoint` shall compare.
        add: Writes more into the folder of the checkpoint.
    """
    partial = output / f"partial-{step}"
    accelerator.save_state(str(partial))
    if add is not None:
        add(partial)
    accelerator.wait_for_everyone()  # every process writes its own random state
    if accelerator.is_main_process:
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2))
        partial.rename(output / f"checkpoint-{step}")
        for old in checkpoints(output)[: -max(limit, 1)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def remove_leftovers(output: Path) -> None:
    """Delete what a killed run left half-written in its folder, and nothing else that lies there."""
    for path in output.iterdir():
        own = path.name == FINISHED or path.match(f".{FINISHED}.*.partial") or re.fullmatch(r"partial-\d+", path.name)
        if own and path.is_dir():
            shutil.rmtree(path)


def averaged_state(ema: EMAModel, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model with the averages in place of what is trained, gathered from shards, on the CPU.

    Args:
        ema: Averages of the parameters that require a gradient, in their order.
        model: The model; where it is sharded every process must call this.
    """
    averages = iter(ema.shadow_params)
    parameters = {
        name: next(averages) if parameter.requires_grad else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    return {name: _whole(tensor).cpu() for name, tensor in (dict(model.named_buffers()) | parameters).items()}


def save_average(accelerator: Accelerator, ema: EMAModel, model: nn.Module, folder: Path) -> None:
    """Write `ema.safetensors`; every process must call this."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = [_whole(shadow).cpu().contiguous() for shadow in ema.shadow_params]
    if accelerator.is_main_process:
        metadata = {"optimization_step": str(ema.optimization_step)}
        save_file(dict(zip(names, whole, strict=True)), folder / "ema.safetensors", metadata)


def load_average(ema: EMAModel, model: nn.Module, folder: Path) -> None:
    """Bring averages back that `save_average` wrote, sharded as the model is."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with safe_open(folder / "ema.safetensors", "pt") as file:
        ema.optimization_step = int(file.metadata()["optimization_step"])
        for name, shadow in zip(names, ema.shadow_params, strict=True):
            value = file.get_tensor(name).to(shadow.device)
            if isinstance(shadow, DTensor):
                value = distribute_tensor(value, shadow.device_mesh, shadow.placements)
            shadow.copy_(value)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from its shards, if it has some."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
