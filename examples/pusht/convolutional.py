"""Train a convolutional next-frame baseline for Push-T.

    accelerate launch --config_file examples/accelerate_configs/cpu.yaml examples/pusht/convolutional.py \
        --dataset data/pusht-train --output_dir runs/pusht-convolutional --max_train_steps 3000 --learning_rate 1e-3

The baseline is a residual network without attention at a quarter of the frame resolution. Data, loss, rollouts,
checkpoints and most options are those of `train.py`. The result is a pipeline; programs that load the pipeline
must import this module first, as `evaluate.py` does.
"""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from simulator import ARENA
from torch import nn
from torch.nn import functional
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.action_space import ActionSpace
from irasim_diffusers.models import noise_process
from irasim_diffusers.training import (
    RunArguments,
    TrainingData,
    check_ranges,
    check_run_arguments,
    encode_data,
    open_sources,
    run_script,
    save_finished,
    start_accelerator,
    train,
)

OCTAVES = 6  # frequencies of the action map
INAPPLICABLE = (  # options of train.py that do not apply
    *("pretrained_model_name_or_path", "vae", "recorded_latents", "state_keys", "gradient_checkpointing"),
    *("attention_backend", "push_to_hub", "revision", "variant", "terminal_share"),
)


@dataclass(kw_only=True)
class BaselineArguments(RunArguments):
    channels: int = field(default=64, metadata={"help": "channels at a quarter of the resolution"})


class Residual(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the block to (B, C, H, W)."""
        hidden = self.first(functional.silu(self.norm(hidden_states)))
        return hidden_states + self.second(functional.silu(hidden))


class ConvolutionalModel(ModelMixin, ConfigMixin, CacheMixin):
    """Convolutional network that predicts the change from the last history frame to the next frame.

    It takes the place of the transformer of `IRASimPipeline`. The prediction is deterministic: noise and timestep are ignored.

    Args:
        channels: Channels at a quarter of the resolution. The other entries are those of `IRASimTransformer3DModel`.
    """

    _no_split_modules = ["Residual"]
    _repeated_blocks = ["Residual"]

    @register_to_config
    def __init__(
        self,
        channels: int = 64,
        target_extent: tuple[float, ...] = (0.0, 0.0, ARENA, ARENA),
        in_channels: int = 3,
        patch_size: int = 4,
        sample_height: int = 96,
        sample_width: int = 96,
        sample_frames: int = 3,
        num_history_frames: int = 2,
        conditioning: str = "frame",
        action_dim: int = 2,
        action_low: float = 0.0,
        action_high: float = ARENA,
        action_space: str = "absolute",
        action_derivation: str = "recorded",
        cameras: list[list[str]] | None = None,
        fps: float = 10.0,
        relative_latents: bool = True,
        prediction_type: str = "sample",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.stem = nn.Sequential(Residual(channels), Residual(channels))
        self.action = nn.Conv2d(2 * (1 + 2 * OCTAVES), channels, 1)
        self.join = nn.Conv2d(3 * channels, channels, 3, padding=1)
        self.body = nn.Sequential(*(Residual(channels) for _ in range(6)))
        self.out = nn.Conv2d(channels, in_channels * patch_size**2, 3, padding=1)
        for parameter in self.out.parameters():  # a new model predicts no change
            nn.init.zeros_(parameter)

    @property
    def action_space(self) -> ActionSpace:
        """Targets of the pusher in arena units."""
        return ActionSpace.from_config(self.config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        actions: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the change (B, 3, F, H, W) from the last history frame, zero at history frames.

        The last frame of the window (B, 3, F, H, W) is predicted for the target (B, 1, 2), which is ignored where `action_mask`
        (B, 1) is False. `timestep` and `attention_kwargs` have no effect.
        """
        patch, num_history = self.config.patch_size, hidden_states.shape[2] - 1
        history = hidden_states[:, :, [max(num_history - 2, 0), num_history - 1]]  # a single frame is repeated
        last, history = history[:, :, -1], history.clamp(-1, 1)
        features = self.patch(functional.pixel_unshuffle(history.transpose(1, 2).flatten(0, 1), patch))
        features = self.stem(features).unflatten(0, (-1, 2)).flatten(1, 2)  # (B, 2 channels, h, w)
        waves = self._action_map(actions[:, 0], *features.shape[-2:]).to(features.dtype)
        if action_mask is not None:
            waves = waves * action_mask[:, :, None, None]
        hidden = self.join(torch.cat([features, self.action(waves)], dim=1))
        change = functional.pixel_shuffle(self.out(self.body(hidden)), patch)
        # without the last term, errors outside the range of images grow from chunk to chunk in rollouts
        change = (change + history[:, :, -1] - last).unsqueeze(2)
        sample = torch.cat([torch.zeros_like(change).expand(-1, -1, num_history, -1, -1), change], dim=2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _action_map(self, target: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return patch offsets from the target (B, 2), with sines and cosines, as (B, C, rows, columns)."""
        config, (left, top, right, bottom) = self.config, self.config.target_extent
        step = config.patch_size / torch.tensor([config.sample_width, config.sample_height])  # fractions of a frame
        x = left + (right - left) * step[0] * (torch.arange(columns, device=target.device) + 0.5)
        y = top + (bottom - top) * step[1] * (torch.arange(rows, device=target.device) + 0.5)
        centers = torch.stack(torch.meshgrid(x, y, indexing="xy"))  # (2, rows, columns)
        size = torch.tensor([right - left, bottom - top], device=target.device)
        offset = 4 * (centers - target.float()[:, :, None, None]) / size[:, None, None]
        angles = [offset * 2**octave * math.pi / 4 for octave in range(OCTAVES)]
        return torch.cat([offset, *(wave(angle) for angle in angles for wave in (torch.sin, torch.cos))], dim=1)


def build_model(arguments: BaselineArguments, data: TrainingData) -> ConvolutionalModel:
    """Create the model for the frames of the data; raise ValueError if the actions are not targets."""
    (height, width), source, actions = data.parts[0].latent_size, data.sources[0], data.parts[0].actions
    is_target = source.action_derivation in ("recorded", "absolute") and actions.min() >= 0 and actions.max() <= ARENA
    if actions.shape[1] != 2 or not is_target:
        raise ValueError(f"`dataset` must have targets (x, y) in [0, {ARENA}] as actions, as written by collect.py.")
    known = {"fps": source.fps, "cameras": [list(row) for row in source.cameras]}
    return ConvolutionalModel(channels=arguments.channels, sample_height=height, sample_width=width, **known)


def check_arguments(arguments: BaselineArguments) -> None:
    """Check the arguments before anything is read.

    Raises:
        ValueError: If a value is invalid, or an option does not apply to the baseline.
    """
    check_run_arguments(arguments)
    check_ranges(arguments, at_least_1=("channels",))
    for name in INAPPLICABLE:
        if getattr(arguments, name):
            raise ValueError(f"`{name}` does not apply to the convolutional baseline: omit it.")
    if arguments.optimizer == "muon":
        raise ValueError(
            "`optimizer` must be adamw or adamw8bit, got 'muon': the convolutional baseline has no transformer blocks."
        )


def main() -> None:
    (arguments,) = HfArgumentParser(BaselineArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    accelerator = start_accelerator(arguments)
    sources = open_sources(arguments)
    data = encode_data(sources, None, ConvolutionalModel().config, arguments, accelerator)
    model = build_model(arguments, data)
    copy = functools.partial(ConvolutionalModel.from_config, model.config)
    run = train(model, data, copy, arguments, accelerator)
    averaged = run.averaged()
    if accelerator.is_main_process:
        process = noise_process(averaged.config)
        scheduler = DDIMScheduler.from_config(process.config, timestep_spacing="trailing")
        pipeline = IRASimPipeline(None, averaged, scheduler, num_inference_steps=1)
        save_finished(Path(arguments.output_dir), pipeline.save_pretrained)
    accelerator.end_training()


if __name__ == "__main__":
    from convolutional import main  # the pipeline stores the module name, which must not be `__main__`

    run_script(main)
