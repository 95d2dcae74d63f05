"""The 3-D U-Net of the paper's baselines: VDM on pixels, LVDM on latents.

References: "Video Diffusion Models" (https://arxiv.org/abs/2204.03458) and appendix 9 of "IRASim: A Fine-Grained World Model
for Robot Manipulation" (https://arxiv.org/abs/2406.14540).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    Timesteps,
    get_1d_rotary_pos_embed,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import maybe_allow_in_graph
from torch import nn

from ..action_space import ActionSpace
from .action_features import action_features
from .transformer_irasim import IRASimAttention, IRASimAttnProcessor, check_shared_config

UNET_PRESETS: dict[str, dict[str, Any]] = {
    "VDM": {"block_out_channels": [64, 128, 256, 512], "in_channels": 3, "sample_height": 256, "sample_width": 320},
    "LVDM": {"block_out_channels": [288, 576, 1152, 2304], "in_channels": 4},
}
"""The paper's baselines (Tables 8 and 9) on RT-1; VDM on Language-Table has frames of 144x256."""

NORM_GROUPS = 8
MAX_RESOLUTIONS, MAX_WIDTH = 12, 16384
MAX_SEQUENCES = 2**15  # CUDA limits the grid dimension to 16 bits; temporal attention has one sequence per pixel


class UNetLinearAttnProcessor(IRASimAttnProcessor):
    """Self-attention with a cost linear in the number of tokens (https://arxiv.org/abs/1812.01243)."""

    def __call__(
        self,
        attn: IRASimAttention,
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply linear self-attention to tokens (B, S, D)."""
        query, key, value = self.project(attn, hidden_states)  # (B, S, heads, head_dim)
        query = query.float().softmax(-1) * query.shape[-1] ** -0.5
        key = key.float().softmax(1)
        context = torch.einsum("bshd,bshe->bhde", key, value.float())
        hidden_states = torch.einsum("bshd,bhde->bshe", query, context).flatten(-2).to(hidden_states.dtype)
        hidden_states = attn.to_out[0](hidden_states)
        return attn.to_out[1](hidden_states)


class UNetTrajectoryAttention(nn.Module):
    """Residual self-attention among the pixels of a frame or, if temporal, among the frames of a pixel."""

    def __init__(
        self, channels: int, num_heads: int, head_dim: int, temporal: bool = False, linear: bool = False
    ) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm = nn.LayerNorm(channels)
        self.attn = IRASimAttention(channels, num_heads, head_dim, temporal=temporal)
        if linear:
            self.attn.processor = UNetLinearAttnProcessor()

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_frames: int,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply attention to features (B F, C, H, W)."""
        tokens = hidden_states.unflatten(0, (-1, num_frames)).movedim(2, -1).flatten(2, 3)  # (B, F, S, C)
        if self.temporal:
            tokens = tokens.transpose(1, 2)  # (B, S, F, C)
        sequences = self.norm(tokens).flatten(0, 1)
        attended = [self.attn(part, image_rotary_emb) for part in sequences.split(MAX_SEQUENCES)]
        tokens = torch.cat(attended).unflatten(0, tokens.shape[:2])
        if self.temporal:
            tokens = tokens.transpose(1, 2)
        return hidden_states + tokens.flatten(0, 1).mT.unflatten(-1, hidden_states.shape[-2:])


@maybe_allow_in_graph
class UNetTrajectoryBlock(nn.Module):
    """Residual blocks within frames, attention within and between frames.

    In down and up blocks, both residual blocks come first and attention within frames is linear. In the middle block, which has
    few pixels, attention is full and is applied between the residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        num_heads: int,
        head_dim: int,
        middle: bool = False,
    ) -> None:
        super().__init__()
        self.middle = middle
        self.resnets = nn.ModuleList(
            [
                ResnetBlock2D(
                    in_channels=channels,
                    out_channels=out_channels,
                    temb_channels=temb_channels,
                    groups=NORM_GROUPS,
                    time_embedding_norm="scale_shift",
                )
                for channels in (in_channels, out_channels)
            ]
        )
        self.attention = UNetTrajectoryAttention(out_channels, num_heads, head_dim, linear=not middle)
        self.temporal_attention = UNetTrajectoryAttention(out_channels, num_heads, head_dim, temporal=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        num_frames: int,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states: Features (B F, C, H, W).
            temb: Condition of each frame (B F, D).
            num_frames: Number of frames F of a window.
            image_rotary_emb: Cosines and sines (F, head_dim) of the frames' positions.

        Returns:
            Features (B F, C', H, W).
        """
        hidden_states = self.resnets[0](hidden_states, temb)
        if not self.middle:
            hidden_states = self.resnets[1](hidden_states, temb)
        hidden_states = self.attention(hidden_states, num_frames)
        hidden_states = self.temporal_attention(hidden_states, num_frames, image_rotary_emb)
        if self.middle:
            hidden_states = self.resnets[1](hidden_states, temb)
        return hidden_states


class UNetTrajectoryModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """The U-Net of VDM and LVDM, conditioned on the clean history and a whole trajectory.

    It denoises the future frames. Space and time are factorized: convolutions and attention within frames,
    attention between the frames of a pixel. An MLP embeds the trajectory, which has a fixed number of actions. The
    concatenated embeddings of trajectory and timestep scale and shift the features of every residual block but the last. All
    frames thus receive all actions, as in Video-Ada.

    Residual blocks, downsamplers and upsamplers are those of diffusers. Unlike in the released code of the baselines, residual
    blocks normalize each frame separately, before the convolution, and temporal positions are rotary, without a learned bias.
    With the paper's settings on RT-1 (15 actions of 7 components), VDM has 44,518,595 parameters and LVDM 687,572,260. The paper
    reports 40M and 687M; the layers of the released code add up to 44.50M and 687.52M.

    Args:
        block_out_channels: Channels of each resolution, the finest first; each further resolution halves height and width.
        num_attention_heads: Number of attention heads.
        attention_head_dim: Number of channels per head.
        condition_dim: Size of the trajectory embedding.
        in_channels: Number of channels of the latents, or 3 for a model in pixel space.
        sample_height: Height of the latents in training; other sizes are supported.
        sample_width: Width of the latents in training; other sizes are supported.
        sample_frames: Number of frames of a window in training, including the history.
        num_history_frames: Exact number of history frames.
        conditioning: `"video"`, the only choice: the whole trajectory conditions all frames.
        action_frequencies: Number of octaves of sines and cosines of the scaled actions that are added to the action features,
            the lowest with a wavelength of 16. 0 in the paper.
        action_dim: Number of action components.
        action_scale: The network receives `(action - action_offset) * action_scale`; one number, or one per component.
        action_offset: See `action_scale`.
        action_names: Names of the components.
        action_units: Units of the components.
        action_low: Lower bound of the data or the robot, in raw units, one number or one per component; None if unknown.
        action_high: Upper bound; see `action_low`.
        action_space: `"relative"` if an action is a motion, `"absolute"` if it is a target position.
        action_derivation: `"recorded"`, or how actions are computed from states, one of `actions.DERIVATIONS`.
        cameras: Names of the cameras as tiled in a frame: rows from top to bottom, each from left to right.
        fps: Frames per second of the data, if known.
        relative_latents: Whether the latents of predicted frames are relative to the last history frame.
        prediction_type: Output of the network, as in diffusers' schedulers; `"flow_prediction"` for rectified flow, which has
            no betas.
        num_train_timesteps: Number of timesteps of the noise process in training; this entry and the next three are as in
            diffusers.
        beta_start: First noise variance.
        beta_end: Last noise variance.
        beta_schedule: Schedule of the variances from `beta_start` to `beta_end`.

    Raises:
        ValueError: If an entry of the config is invalid, or entries are inconsistent.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UNetTrajectoryBlock"]
    _repeated_blocks = ["UNetTrajectoryBlock"]
    _skip_layerwise_casting_patterns = ["conv_in", "norm", "time_embed", "action_embed"]

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (64, 128, 256, 512),
        num_attention_heads: int = 8,
        attention_head_dim: int = 32,
        condition_dim: int = 768,
        in_channels: int = 4,
        sample_height: int = 32,
        sample_width: int = 40,
        sample_frames: int = 16,
        num_history_frames: int = 1,
        conditioning: str = "video",
        action_frequencies: int = 0,
        action_dim: int = 7,
        action_scale: float | list[float] = 1.0,
        action_offset: float | list[float] = 0.0,
        action_names: list[str] | None = None,
        action_units: list[str] | None = None,
        action_low: float | list[float | None] | None = None,
        action_high: float | list[float | None] | None = None,
        action_space: str = "relative",
        action_derivation: str = "recorded",
        cameras: list[list[str]] | None = None,
        fps: float | None = None,
        relative_latents: bool = False,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
    ) -> None:
        super().__init__()
        _check_config(self.config)
        base = block_out_channels[0]
        num_actions = sample_frames - num_history_frames

        self.time_proj = Timesteps(base, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(base, 4 * base)
        features = action_dim * (1 + 2 * action_frequencies)
        self.action_embed = PixArtAlphaTextProjection(features * num_actions, 4 * condition_dim, condition_dim)
        self.null_action = nn.Parameter(torch.randn(condition_dim))
        block = partial(
            UNetTrajectoryBlock,
            temb_channels=4 * base + condition_dim,
            num_heads=num_attention_heads,
            head_dim=attention_head_dim,
        )

        self.conv_in = nn.Conv2d(in_channels, base, kernel_size=7, padding=3)
        self.attention_in = UNetTrajectoryAttention(base, num_attention_heads, attention_head_dim, temporal=True)
        self._init_blocks(block)
        self.resnet_out = ResnetBlock2D(
            in_channels=2 * base, out_channels=base, temb_channels=None, groups=NORM_GROUPS
        )
        self.conv_out = nn.Conv2d(base, in_channels, kernel_size=1)
        for parameter in self.conv_out.parameters():  # a new model predicts zero
            nn.init.zeros_(parameter)

        self.gradient_checkpointing = False

    def _init_blocks(self, block: Callable[..., UNetTrajectoryBlock]) -> None:
        """Create the blocks, downsamplers and upsamplers of all resolutions.

        `block` creates a block from its numbers of input and output channels.
        """
        channels = self.config.block_out_channels
        widths = list(zip([channels[0], *channels[:-1]], channels, strict=True))
        self.down_blocks = nn.ModuleList([block(before, after) for before, after in widths])
        self.downsamplers = nn.ModuleList(
            [Downsample2D(width, use_conv=True, kernel_size=4, name="op") for width in channels[:-1]]
        )
        self.mid_block = block(channels[-1], channels[-1], middle=True)
        self.up_blocks = nn.ModuleList([block(2 * after, before) for before, after in reversed(widths)])
        self.upsamplers = nn.ModuleList(
            [Upsample2D(before, use_conv_transpose=True) for before, _ in reversed(widths[1:])]
        )

    @property
    def action_space(self) -> ActionSpace:
        """The checkpoint's action space."""
        return ActionSpace.from_config(self.config)

    def encode_actions(
        self,
        actions: torch.Tensor | None,
        action_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Embed the actions of a trajectory, in raw units.

        Args:
            actions: Actions (B, n, A), or None.
            action_mask: Booleans (B, n); the null action replaces the whole trajectory where any is False.
            dtype: Type of the model's features, in which scaled actions are embedded.

        Returns:
            One embedding of the trajectory (B, D). Without actions, B is 1.
        """
        if actions is None:
            return self.null_action.to(dtype).unsqueeze(0)
        space = self.action_space
        scale, offset = (
            torch.tensor(values, dtype=torch.float32, device=actions.device) for values in (space.scale, space.offset)
        )
        features = action_features(actions, scale, offset, self.config.action_frequencies)
        embedding = self.action_embed(features.to(dtype).flatten(1))
        if action_mask is None:
            return embedding
        return torch.where(action_mask.all(dim=1, keepdim=True), embedding, self.null_action.to(embedding))

    def _check_actions(self, actions: torch.Tensor, num_frames: int) -> None:
        number = self.config.sample_frames - self.config.num_history_frames
        if actions.shape[1:] != (number, self.config.action_dim) or number > num_frames:
            raise ValueError(
                f"`actions` must be (batch, {number}, {self.config.action_dim}) for a window of at least {number} frames, got "
                f"{tuple(actions.shape)} for a window of {num_frames}: the U-Net requires this number of actions."
            )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        actions: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> UNet3DConditionOutput | tuple[torch.Tensor]:
        """Predict noise, velocity, sample or flow, as in `prediction_type`, for each frame of a window.

        Args:
            hidden_states: Latents or pixels (B, C, F, H, W), the clean history first; any H and W, and any F of at least n.
            timestep: Diffusion timesteps (B,), or one per frame (B, F).
            actions: Actions (B, n, A) in raw units; n must be `sample_frames - num_history_frames`. They lead to the last n
                frames. None selects the null action.
            action_mask: Booleans (B, n); where any is False, the null action replaces the trajectory (action dropout).
            attention_kwargs: `{"scale": s}` scales the LoRA layers.
            return_dict: Return a `UNet3DConditionOutput` instead of a tuple.

        Returns:
            The prediction (B, C, F, H, W); the values at history frames are undefined.

        Raises:
            ValueError: If the shape of the actions is wrong.
        """
        batch_size, _, num_frames, height, width = hidden_states.shape
        if actions is not None:
            self._check_actions(actions, num_frames)
        multiple = 2 ** len(self.downsamplers)  # height and width must be divisible by this number
        hidden_states = F.pad(hidden_states, (0, -width % multiple, 0, -height % multiple, 0, 0), mode="replicate")
        hidden_states = self.conv_in(hidden_states.transpose(1, 2).flatten(0, 1))  # (B F, D, H, W)
        dtype = hidden_states.dtype

        timestep = timestep if timestep.ndim == 2 else timestep.reshape(-1, 1)
        timestep = timestep.expand(batch_size, num_frames)
        temb = self.time_embed(self.time_proj(timestep.flatten()).to(dtype))  # (B F, 4 D)
        condition = self.encode_actions(actions, action_mask, dtype).unsqueeze(1)  # (B or 1, 1, E)
        condition = condition.expand(batch_size, num_frames, -1).flatten(0, 1)
        temb = torch.cat([temb, condition], dim=-1)  # (B F, 4 D + E)
        frames = torch.arange(num_frames, device=hidden_states.device)
        rotary = get_1d_rotary_pos_embed(self.config.attention_head_dim, frames, use_real=True)

        hidden_states = self._run(self.attention_in, hidden_states, num_frames, rotary)
        finest, skips = hidden_states, []
        for block, downsampler in zip(self.down_blocks, [*self.downsamplers, nn.Identity()], strict=True):
            hidden_states = self._run(block, hidden_states, temb, num_frames, rotary)
            skips.append(hidden_states)
            hidden_states = downsampler(hidden_states)
        hidden_states = self._run(self.mid_block, hidden_states, temb, num_frames, rotary)
        for block, upsampler in zip(self.up_blocks, [*self.upsamplers, nn.Identity()], strict=True):
            hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
            hidden_states = self._run(block, hidden_states, temb, num_frames, rotary)
            hidden_states = upsampler(hidden_states)
        hidden_states = self.resnet_out(torch.cat([hidden_states, finest], dim=1), None)
        hidden_states = self.conv_out(hidden_states)

        sample = hidden_states.unflatten(0, (batch_size, num_frames)).transpose(1, 2)[..., :height, :width]
        return UNet3DConditionOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block: nn.Module, *inputs: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


def _check_config(config: Any) -> None:
    """Raise ValueError if an entry of the config is invalid."""
    if config.conditioning != "video":
        raise ValueError(
            f"`conditioning` must be video, got {config.conditioning!r}: the U-Net is conditioned on the whole trajectory."
        )
    widths = config.block_out_channels
    sizes = [*widths, config.condition_dim] if isinstance(widths, list | tuple) else []
    if not (
        sizes and len(widths) <= MAX_RESOLUTIONS and all(type(size) is int and 0 < size <= MAX_WIDTH for size in sizes)
    ):
        raise ValueError(
            f"`block_out_channels` must be 1 to {MAX_RESOLUTIONS} integers and `condition_dim` one integer, all in "
            f"[1, {MAX_WIDTH}], got {widths!r:.60} and {config.condition_dim!r:.60}."
        )
    if any(channels % NORM_GROUPS for channels in config.block_out_channels):
        raise ValueError(
            f"`block_out_channels` must be multiples of {NORM_GROUPS}, the number of groups of a normalization layer, got "
            f"{config.block_out_channels}."
        )
    check_shared_config(config)
    if config.attention_head_dim % 2:
        raise ValueError(f"`attention_head_dim` must be even for rotary positions, got {config.attention_head_dim}.")
