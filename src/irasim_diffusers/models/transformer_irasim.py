"""The IRASim transformer: alternating spatial and temporal blocks, modulated by timestep and actions.

Reference: "IRASim: A Fine-Grained World Model for Robot Manipulation" (https://arxiv.org/abs/2406.14540), section 3 and
appendix 8. Where the paper and its released code differ, this file follows the code, because the released weights were trained
with it.

The file exceeds 500 lines because diffusers keeps a model in one file. `IRASimTransformer3DModel.__init__` exceeds 60 lines
because its signature is the flat config, and `forward` because of its documentation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    PatchEmbed,
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device, maybe_allow_in_graph
from torch import nn

from ..action_space import ActionSpace
from .action_features import action_features
from .moving_layers import Memory, MovingLayers

PRESETS: dict[str, dict[str, int]] = {
    "S": {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 6, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 12, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 14, "num_attention_heads": 16, "attention_head_dim": 72},
}
"""Sizes of the paper (Table 11); `num_layers` counts pairs of a spatial and a temporal block."""

ACTION_ENCODER = ("action_embed.", "trajectory_embed.", "null_action")
"""Name prefixes of the action encoder weights."""

TARGET_OCTAVES = 6
"""Number of octaves of the Fourier features of a patch's offset from the target. The longest wavelength is four times the frame."""

LIMITS = {
    "num_attention_heads": 256,
    "attention_head_dim": 1024,
    "num_layers": 256,
    "in_channels": 1024,
    "patch_size": 64,
    "sample_height": 4096,
    "sample_width": 4096,
    "sample_frames": 4096,
    "num_history_frames": 4096,
    "action_dim": 1024,
    "num_train_timesteps": 100_000,
}
"""Config entries that are positive integers, with upper limits, which bound the memory that a config can request."""

RANGES = {
    "action_frequencies": (0, 32),
    "moving_layers": (0, 64),
    "fps": (1e-3, 1e5),
    "base_patch_size": (1e-3, 1e3),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
}
"""Ranges of other numbers in a config."""

INTEGERS = ("action_frequencies", "moving_layers")
"""Entries of `RANGES` that are integers."""

MAX_WINDOW = 1 << 28
"""Maximum number of values of a window: channels x frames x height x width."""

SWITCH = (False, True)
CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "conditioning": ("frame", "video"),
    "norm_type": ("ada_norm_zero", "ada_norm_single"),
    "temporal_position": ("sincos", "rope"),
    "spatial_position": ("grid", "area", "fixed", "rope"),
    "history_timestep": ("same", "zero"),
    "action_activation": ("gelu_tanh", None),
    "activation_fn": ("gelu-approximate", "gelu"),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "final_frame_ada": SWITCH,
    "ff_conv": SWITCH,
    "use_fps": SWITCH,
    "relative_latents": SWITCH,
    "scale_noisy_latents": SWITCH,
}
"""Valid values of config entries."""

SHORT = 4
"""Maximum number of frames for `short_attention`, which a compiled model uses on a CPU."""

CPU = torch.device("cpu")
INF = float("inf")


def short_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute attention for short sequences with elementwise operations, which `torch.compile` fuses.

    Query, key and value are (B, S, heads, head_dim). On a CPU, this takes a quarter of the time of matrix products.
    """
    scores = (query.unsqueeze(2) * key.unsqueeze(1)).sum(-1, dtype=torch.float32)  # (B, S queries, S keys, heads)
    weights = (scores * query.shape[-1] ** -0.5).softmax(2).to(value.dtype)
    return (weights.unsqueeze(-1) * value.unsqueeze(1)).sum(2)


def rotate_halves(hidden_states: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate pairs of channels, one from each half of a head.

    Equal to diffusers' `apply_rotary_emb` with `use_real_unbind_dim=-2`, but in the dtype of the tokens: in bfloat16 on a CPU,
    this takes an eighth of the time.

    Args:
        hidden_states: Query or key (B, S, heads, head_dim).
        rotary_emb: Cosines and sines (S, head_dim).
    """
    cos, sin = (table.unsqueeze(1).to(hidden_states.dtype) for table in rotary_emb)
    first, second = hidden_states.chunk(2, dim=-1)
    return hidden_states * cos + torch.cat([-second, first], dim=-1) * sin


class IRASimAttnProcessor:
    """Self-attention through diffusers' dispatch, which supports all attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "IRASimAttention",
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply self-attention to tokens (B, S, D), with rotary positions given by cosines and sines."""
        query, key, value = self.project(attn, hidden_states)  # (B, S, heads, head_dim)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            # temporal attention rotates pairs of adjacent channels (Open-Sora), spatial attention pairs from both halves of a head
            rotate = partial(apply_rotary_emb, sequence_dim=1) if attn.temporal else rotate_halves
            query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)

        if attn.temporal and query.shape[1] <= SHORT and query.device.type == "cpu" and torch.compiler.is_compiling():
            hidden_states = short_attention(query, key, value)
        else:
            hidden_states = dispatch_attention_fn(
                query,
                key,
                value,
                backend=self._attention_backend,
                # context parallelism splits the patches (see `_cp_plan`), not the frames
                parallel_config=None if attn.temporal else self._parallel_config,
            )
        hidden_states = hidden_states.flatten(-2)  # (B, S, D)
        hidden_states = attn.to_out[0](hidden_states)
        return attn.to_out[1](hidden_states)

    @staticmethod
    def project(attn: "IRASimAttention", hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return query, key and value (B, S, heads, head_dim) of tokens (B, S, D)."""
        if attn.fused_projections:
            projections = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projections = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return tuple(projection.unflatten(-1, (attn.heads, -1)) for projection in projections)


class IRASimAttention(nn.Module, AttentionModuleMixin):
    """Self-attention with diffusers' names for the projections."""

    _default_processor_cls = IRASimAttnProcessor
    _available_processors = [IRASimAttnProcessor]
    processor: IRASimAttnProcessor
    to_qkv: nn.Linear  # created by fuse_projections

    def __init__(
        self, dim: int, heads: int, dim_head: int, qk_norm: str | None = None, temporal: bool = False
    ) -> None:
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"`qk_norm` must be None or rms_norm, got {qk_norm!r}.")
        self.norm_q = nn.RMSNorm(dim_head, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(dim_head, eps=1e-6) if qk_norm else None
        self.heads = heads
        self.temporal = temporal
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q = nn.Linear(dim, heads * dim_head)
        self.to_k = nn.Linear(dim, heads * dim_head)
        self.to_v = nn.Linear(dim, heads * dim_head)
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, dim), nn.Dropout(0.0)])
        self.processor = self._default_processor_cls()

    def forward(
        self, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Apply self-attention to tokens (B, S, D)."""
        return self.processor(self, hidden_states, image_rotary_emb)


@maybe_allow_in_graph
class IRASimTransformerBlock(nn.Module):
    """A DiT block over the patches of a frame or the frames of a patch, with adaLN-zero or -single."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        temporal: bool,
        norm_type: str = "ada_norm_zero",
        qk_norm: str | None = None,
        ff_conv: bool = False,
        activation_fn: str = "gelu-approximate",
    ) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn1 = IRASimAttention(dim, num_attention_heads, attention_head_dim, qk_norm, temporal)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn=activation_fn)
        self.ff_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if ff_conv else None
        self.norm_type = norm_type
        if norm_type == "ada_norm_zero":
            self.ada_norm = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        else:
            self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        position_embedding: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states: Tokens (B, F, S, D).
            temb: Condition of each frame (B, F, D), or one for all frames (B, 1, D). With adaLN-single, the modulation of
                width 6 D that all blocks share.
            image_rotary_emb: Cosines and sines of rotary positions, (S, head_dim) in a spatial block and (F, head_dim) in a
                temporal one.
            position_embedding: Positions (F, 1, D) that are added to the tokens first. The block adds them instead of the
                model, so that a cache that skips the block also skips the positions.
            grid: Rows and columns of the S tokens, for a block with `ff_conv`.

        Returns:
            Tokens (B, F, S, D).
        """
        if position_embedding is not None:
            hidden_states = hidden_states + position_embedding
        if self.norm_type == "ada_norm_zero":
            modulation = self.ada_norm(temb).unsqueeze(2)  # (B, F, 1, 6 D)
        else:
            modulation = (temb + self.scale_shift_table.flatten()).unsqueeze(2)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)

        # `addcmul` multiplies and adds in one pass over memory
        attn_input = torch.addcmul(shift_attn, self.norm1(hidden_states), 1 + scale_attn)
        if self.temporal:
            attn_input = attn_input.transpose(1, 2)  # (B, S, F, D)
        attn_output = self.attn1(attn_input.flatten(0, 1), image_rotary_emb).unflatten(0, attn_input.shape[:2])
        if self.temporal:
            attn_output = attn_output.transpose(1, 2)  # (B, F, S, D)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attn_output)

        ff_input = torch.addcmul(shift_ff, self.norm2(hidden_states), 1 + scale_ff)
        if self.ff_conv is not None:
            images = ff_input.flatten(0, 1).unflatten(1, grid).permute(0, 3, 1, 2)  # (B F, D, rows, columns)
            images = self.ff_conv(images).permute(0, 2, 3, 1)
            ff_input = ff_input + images.reshape(ff_input.shape)
        return torch.addcmul(hidden_states, gate_ff, self.ff(ff_input))


@dataclass
class IRASimTransformer3DModelOutput(Transformer2DModelOutput):
    """Output of `IRASimTransformer3DModel`.

    Args:
        sample: The prediction (B, C, F, H, W).
        moved: With `return_components`, the prediction (B, C, n, H, W) by the moved layers alone; see `MovingLayers`.
        generated: With `return_components`, the prediction (B, C, n, H, W) by the usual output layer.
        memory: With `moving_layers`, the memory after the last frame, for the next chunk of a rollout.
    """

    moved: torch.Tensor | None = None
    generated: torch.Tensor | None = None
    memory: Memory | None = None


class IRASimTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """IRASim: denoises the future frames of a window, given the clean history and one action per frame.

    Frame-Ada: the spatial blocks of frame i are modulated by the sum of the timestep embedding and the embedding of the action
    that leads to frame i. History frames receive a learned null action. Temporal blocks receive the timestep embedding only.
    Video-Ada: every block is modulated by the timestep embedding plus one embedding of all actions, whose number is fixed.

    Args:
        num_attention_heads: Number of attention heads.
        attention_head_dim: Number of channels per head; the model width is heads x channels.
        num_layers: Number of pairs of a spatial and a temporal block.
        in_channels: Number of channels of the latents, or 3 for a model in pixel space.
        patch_size: Side length of a patch, in latent pixels.
        sample_height: Height of the latents in training; other sizes are supported.
        sample_width: Width of the latents in training; other sizes are supported.
        sample_frames: Number of frames of a window in training, including the history.
        num_history_frames: Maximum number of history frames in training; for Video-Ada the exact number.
        conditioning: `"frame"` for Frame-Ada, `"video"` for Video-Ada.
        final_frame_ada: Whether Frame-Ada's final layer receives the actions; False in the released weights.
        norm_type: `"ada_norm_zero"`, or `"ada_norm_single"` (Open-Sora and Latte), for the blocks and the final layer.
        qk_norm: `"rms_norm"` (Open-Sora) or None.
        temporal_position: `"sincos"`, or `"rope"` (Open-Sora).
        spatial_position: `"grid"`; `"area"` (Open-Sora), the integer grid scaled to an area of 512x512 pixels; `"fixed"`
            (Latte), a grid of 64x64 latent pixels that is stretched to other sizes; `"rope"`, two-dimensional rotary positions
            in the attention of every spatial block.
        ff_conv: Whether the feed-forward of the spatial blocks starts with a residual depthwise 3x3 convolution over the
            grid of patches, similar to the Mix-FFN of SANA (https://arxiv.org/abs/2410.10629).
        activation_fn: Activation of the feed-forward, `"gelu-approximate"` as in the paper, or `"gelu"`, which differs by at most
            0.0005 and takes a third of the time in bfloat16 on a CPU.
        base_patch_size: Patch size of the pretrained model, which is the unit of `"grid"` positions; None if the patch size
            was not changed.
        use_fps: Whether frames per second are embedded (Open-Sora).
        history_timestep: Timestep of history frames: `"same"` as the predicted frames, or `"zero"`.
        action_activation: Activation of the action encoder, `"gelu_tanh"`. None for the released Language-Table weights,
            which have no activation; in their Video-Ada variant, a second network combines the embedded actions.
        action_frequencies: Number of octaves of sines and cosines of the scaled actions that are added to the action features,
            the lowest with a wavelength of 16. They resolve the exact position of an absolute target. 0 in the paper.
        target_extent: Left, top, right and bottom edges of a frame of `sample_height` x `sample_width` in the units of the first
            two action components, for Frame-Ada and absolute actions that begin with a target in the image plane. Every patch of
            a predicted frame then receives an embedding of its offset from the target of that frame. None (as in the paper)
            disables it.
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
        moving_layers: Number of layers that are moved to predict a frame; see `MovingLayers`. One for each object that moves
            rigidly in the image plane. Requires Frame-Ada with `prediction_type="sample"` and `relative_latents`. 0 (as in the
            paper) predicts every patch from its token.
        relative_latents: Whether the latents of predicted frames are relative to the last history frame, so that static parts
            are zero. Training subtracts that frame, and sampling adds it again. False in the paper.
        scale_noisy_latents: Whether the latents of predicted frames are first multiplied by the square root of the cumulative
            alpha of their timestep, the best linear estimate of clean latents of unit variance. The input is then almost zero
            for pure noise, so that one denoising step is sufficient. Not for rectified flow. False in the paper.
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
    _no_split_modules = ["IRASimTransformerBlock", "MovingLayers"]
    _repeated_blocks = ["IRASimTransformerBlock"]
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "norm",
        "time_embed",
        "fps_embed",
        "action_embed",
        "target_embed",
        "trajectory_embed",
        "layers_out",
    ]
    # patches are split, so that only spatial attention communicates; conditions and positions have no patch dimension
    _cp_plan = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=2, expected_dims=4)},
        "proj_out": ContextParallelOutput(gather_dim=2, expected_dims=4),
    }

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_layers: int = 14,
        in_channels: int = 4,
        patch_size: int = 2,
        sample_height: int = 32,
        sample_width: int = 40,
        sample_frames: int = 16,
        num_history_frames: int = 1,
        conditioning: str = "frame",
        final_frame_ada: bool = False,
        norm_type: str = "ada_norm_zero",
        qk_norm: str | None = None,
        temporal_position: str = "sincos",
        spatial_position: str = "grid",
        ff_conv: bool = False,
        activation_fn: str = "gelu-approximate",
        base_patch_size: float | None = None,
        use_fps: bool = False,
        history_timestep: str = "same",
        action_activation: str | None = "gelu_tanh",
        action_frequencies: int = 0,
        target_extent: list[float] | None = None,
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
        moving_layers: int = 0,
        relative_latents: bool = False,
        scale_noisy_latents: bool = False,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
    ) -> None:
        super().__init__()
        check_config(self.config)

        dim = num_attention_heads * attention_head_dim
        num_actions = sample_frames - num_history_frames
        self.patch_embed = PatchEmbed(
            height=sample_height,
            width=sample_width,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=dim,
            pos_embed_type=None,
        )
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, dim)
        if use_fps:
            self.fps_embed = TimestepEmbedding(256, dim)
        joint = conditioning == "video" and action_activation is not None
        features = action_dim * (1 + 2 * action_frequencies)
        self.action_embed = PixArtAlphaTextProjection(features * (num_actions if joint else 1), 4 * dim, dim)
        if action_activation is None:
            self.action_embed.act_1 = nn.Identity()
            if conditioning == "video":
                self.trajectory_embed = PixArtAlphaTextProjection(dim * num_actions, dim * num_actions, dim)
        self.null_action = nn.Parameter(torch.zeros(dim))
        if target_extent is not None:
            self.target_embed = PixArtAlphaTextProjection(2 * (1 + 2 * TARGET_OCTAVES), dim, dim)

        def block(temporal: bool) -> IRASimTransformerBlock:
            sizes = (dim, num_attention_heads, attention_head_dim)
            return IRASimTransformerBlock(
                *sizes, temporal, norm_type, qk_norm, ff_conv and not temporal, activation_fn
            )

        self.transformer_blocks = nn.ModuleList([block(temporal=False) for _ in range(num_layers)])
        self.temporal_transformer_blocks = nn.ModuleList([block(temporal=True) for _ in range(num_layers)])

        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        if norm_type == "ada_norm_zero":
            self.ada_norm_out = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        else:
            self.ada_norm_single = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
            self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        if moving_layers:
            self.layers_out = MovingLayers(dim, in_channels, patch_size, moving_layers)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)

        self.gradient_checkpointing = False
        self._tables: dict[tuple, Any] = {}
        self._tables_config: Any = None
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialize like DiT: every block is the identity, and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        for linear in (self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.null_action, std=0.02)
        if self.config.moving_layers:
            self.layers_out.initialize_weights()
        zeros: list[Any] = [self.proj_out]
        if self.config.ff_conv:
            zeros += [block.ff_conv for block in self.transformer_blocks]
        if self.config.norm_type == "ada_norm_zero":
            blocks = [*self.transformer_blocks, *self.temporal_transformer_blocks]
            zeros += [self.ada_norm_out[1], *(block.ada_norm[1] for block in blocks)]
        else:
            zeros.append(self.ada_norm_single[1])
        for linear in zeros:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def action_space(self) -> ActionSpace:
        """The checkpoint's action space."""
        return ActionSpace.from_config(self.config)

    def encode_actions(
        self,
        actions: torch.Tensor | None,
        num_frames: int,
        action_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Embed actions in raw units.

        Args:
            actions: Actions (B, n, A) of the last n frames, or None.
            num_frames: Number of frames F of the window; the first F - n receive the null action.
            action_mask: Booleans (B, n); actions at False are replaced by the null action. Video-Ada replaces the whole
                trajectory if any is False.
            dtype: Type of the model's tokens, in which scaled actions are embedded.

        Returns:
            Frame-Ada: one embedding per frame (B, F, D). Video-Ada: one per trajectory (B, 1, D). Without actions, B is 1.

        Raises:
            ValueError: If the shape of the actions is wrong.
        """
        video = self.config.conditioning == "video"
        if actions is None:
            return self.null_action.to(dtype).expand(1, 1 if video else num_frames, -1)
        self._check_actions(actions, num_frames)
        scale, offset = self._cached(self._action_scaling, actions.device)  # (A,) and (A,)
        actions = action_features(actions, scale, offset, self.config.action_frequencies).to(dtype)
        if video:
            embeddings = self._embed_trajectory(actions).unsqueeze(1)  # (B, 1, D)
            action_mask = None if action_mask is None else action_mask.all(dim=1, keepdim=True)
        else:
            embeddings = self.action_embed(actions)  # (B, n, D)
        null_action = self.null_action.to(embeddings)
        if action_mask is not None:
            embeddings = torch.where(action_mask.unsqueeze(-1), embeddings, null_action)
        if video:
            return embeddings
        null = null_action.expand(len(actions), num_frames - actions.shape[1], -1)
        return torch.cat([null, embeddings], dim=1)  # (B, F, D)

    def encode_targets(
        self,
        actions: torch.Tensor,
        num_frames: int,
        grid: tuple[int, int],
        action_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Embed the offset of every patch from the target of its frame.

        Args:
            actions: Actions (B, n, A) of the last n frames, in raw units; the first two components are the target.
            num_frames: Number of frames F of the window; the first F - n, and frames with a masked action, receive zero.
            grid: Rows and columns of the patches.
            action_mask: Booleans (B, n).
            dtype: Type of the model's tokens.

        Returns:
            Embeddings (B, F, S, D).
        """
        centers, scale = self._cached(self._patch_centres, *grid, actions.device)  # (S, 2) and (2,)
        offsets = centers - actions[:, :, None, :2].float()  # (B, n, S, 2)
        features = action_features(offsets, scale, torch.zeros_like(scale), TARGET_OCTAVES)
        embeddings = self.target_embed(features.to(dtype))
        if action_mask is not None:
            embeddings = embeddings * action_mask[:, :, None, None]
        history = embeddings.new_zeros(len(actions), num_frames - actions.shape[1], *embeddings.shape[2:])
        return torch.cat([history, embeddings], dim=1)

    def _patch_centres(self, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the centers (S, 2) of the patches, x and y in the units of the target, and a scale (2,).

        The scale converts the width and the height of a frame to 4.
        """
        config = self.config
        left, top, right, bottom = config.target_extent
        wide = (right - left) * config.patch_size / config.sample_width  # width of a patch in the units of the target
        high = (bottom - top) * config.patch_size / config.sample_height
        x = left + wide * (torch.arange(columns, device=device) + 0.5)
        y = top + high * (torch.arange(rows, device=device) + 0.5)
        centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
        return centers, torch.tensor([4 / (right - left), 4 / (bottom - top)], device=device)

    def _check_actions(self, actions: torch.Tensor, num_frames: int) -> None:
        config = self.config
        fixed = config.sample_frames - config.num_history_frames if config.conditioning == "video" else None
        if (
            actions.ndim != 3
            or actions.shape[-1] != config.action_dim
            or actions.shape[1] > num_frames
            or fixed not in (None, actions.shape[1])
        ):
            number, remedy = f"at most {num_frames}", "pass one action per predicted frame of the window"
            if fixed is not None:
                number, remedy = (
                    f"{fixed} (fixed for Video-Ada)",
                    f"pass {fixed} actions, in a window of at least as many frames",
                )
            raise ValueError(
                f"`actions` must be (batch, {number}, {config.action_dim}), got {tuple(actions.shape)} for a window of "
                f"{num_frames} frames: {remedy}."
            )

    def _embed_trajectory(self, actions: torch.Tensor) -> torch.Tensor:
        """Return one embedding (B, D) of the action features (B, n, K) of a trajectory; see `action_features`."""
        if self.config.action_activation is not None:
            return self.action_embed(actions.flatten(1))
        return self.trajectory_embed(self.action_embed(actions).flatten(1))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        actions: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        fps: float | torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        motion_noise: torch.Tensor | None = None,
        return_components: bool = False,
        memory: Memory | None = None,
    ) -> IRASimTransformer3DModelOutput | tuple[Any, ...]:
        """Predict noise, velocity, sample or flow, as in `prediction_type`, for each frame of a window.

        Args:
            hidden_states: Latents (B, C, F, H, W), the clean history first; any F, and any H and W divisible by the patch size.
            timestep: Diffusion timesteps (B,), or one per frame (B, F); see `history_timestep`.
            actions: Actions (B, n, A) in raw units, n <= F; Video-Ada has a fixed n. They lead to the last n frames; the first
                F - n are history. None gives every frame the null action and treats no frame as history. A model with
                `moving_layers` requires actions and 0 < n < F.
            action_mask: Booleans (B, n); actions at False are replaced by the null action (action dropout); see
                `encode_actions`.
            fps: Frames per second, one number or (B,), for models that embed them; None for the value in the config.
            attention_kwargs: `{"scale": s}` scales the LoRA layers.
            return_dict: Return an `IRASimTransformer3DModelOutput` instead of a tuple.
            motion_noise: Only for training: noise (B, L, 3) that is added to the motions of the L moving layers in rollouts, x and
                y in patches and the angle in units of 0.5 radians. The same noise is added in all predicted frames.
            return_components: Only for training: also return the two predictions of a model with `moving_layers`, which have
                separate losses.
            memory: In a rollout of a model with `moving_layers`, the memory that the previous chunk returned. None segments the last
                history frame.

        Returns:
            The prediction (B, C, F, H, W), whose values at history frames are undefined; with `return_components`, also the moved
            layers and the generated frames, both (B, C, n, H, W); with `moving_layers`, the memory for the next chunk at the end.

        Raises:
            ValueError: If the shape of latents, actions or noise is wrong, `fps` is missing, a model with `moving_layers` has no
                history or no predicted frame, `return_components`, `motion_noise` or `memory` is given for another model, or
                context parallelism is not supported.
        """
        batch_size, _, num_frames, height, width = hidden_states.shape
        grid = self._check_size(height, width)
        if actions is not None:
            self._check_actions(actions, num_frames)
        num_history_frames = num_frames - (0 if actions is None else actions.shape[1])
        last_frame = self._last_history_frame(hidden_states, num_history_frames)
        self._check_layer_inputs(batch_size, motion_noise, return_components, memory)
        timestep = timestep if timestep.ndim == 2 else timestep.reshape(-1, 1)
        timestep = timestep.expand(batch_size, -1)  # (B, F or 1)
        if self.config.scale_noisy_latents:
            hidden_states = self._scale_noisy_latents(hidden_states, timestep, actions)

        hidden_states = self.patch_embed(hidden_states.transpose(1, 2).flatten(0, 1))  # (B F, S, D)
        device, dtype = hidden_states.device, hidden_states.dtype
        spatial_rotary = rotary = positions = None
        if self.config.spatial_position == "rope":
            spatial_rotary = self._cached(self._spatial_rotary_positions, *grid, device)
        else:
            hidden_states = hidden_states + self._cached(self._spatial_positions, *grid, device, dtype)
        hidden_states = hidden_states.unflatten(0, (batch_size, num_frames))  # (B, F, S, D)
        if self.config.target_extent is not None and actions is not None:
            hidden_states = hidden_states + self.encode_targets(actions, num_frames, grid, action_mask, dtype)
        spatial_temb, temporal_temb, final_temb = self._condition(
            timestep, actions, num_frames, action_mask, fps, dtype
        )
        if self.config.temporal_position == "rope":
            rotary = self._cached(self._rotary_positions, num_frames, device)
        else:
            positions = self._cached(self._temporal_positions, num_frames, device, dtype)

        frame_tokens = None
        for spatial_block, temporal_block in zip(
            self.transformer_blocks, self.temporal_transformer_blocks, strict=True
        ):
            hidden_states = self._run(spatial_block, hidden_states, spatial_temb, spatial_rotary, None, grid)
            if last_frame is not None and frame_tokens is None:  # before actions reach the history
                frame_tokens = self.norm_out(hidden_states[:, num_history_frames - 1])
            hidden_states = self._run(temporal_block, hidden_states, temporal_temb, rotary, positions)
            positions = None  # only the first temporal block adds positions

        hidden_states = self._modulate_out(hidden_states, final_temb)
        if last_frame is None:
            outputs: tuple[Any, ...] = (self._project_out(hidden_states, grid),)
        else:
            assert frame_tokens is not None
            tokens = hidden_states[:, num_history_frames:]
            frames, memory = self._move_layers(last_frame, frame_tokens, tokens, grid, motion_noise, memory)
            sample = frames[0].to(dtype)
            sample = nn.functional.pad(sample, (0, 0, 0, 0, num_history_frames, 0))  # (B, C, F, H, W)
            components = frames[1:] if return_components else (None, None)
            outputs = (sample, *components, memory)
        output = IRASimTransformer3DModelOutput(*outputs)
        return output if return_dict else output.to_tuple()

    def _move_layers(
        self,
        last_frame: torch.Tensor,
        frame_tokens: torch.Tensor,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        motion_noise: torch.Tensor | None,
        memory: Memory | None,
    ) -> tuple[tuple[torch.Tensor, ...], Memory]:
        """Return prediction, moved layers and generated frames, relative to the last frame, and the memory."""
        generated = self._project_out(tokens, grid)
        last_frame = last_frame.to(generated.device).unsqueeze(2)  # a model may be split over GPUs
        generated = last_frame.float() + generated
        inputs = (last_frame[:, :, 0], frame_tokens, tokens, grid, generated, motion_noise, memory)
        *frames, memory = self._run(self.layers_out, *inputs)
        return tuple(each.to(generated.device) - last_frame for each in (*frames, generated)), memory

    def _check_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        patch_size = self.config.patch_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"`hidden_states` must have a height and width divisible by the patch size {patch_size}, got "
                f"{height}x{width}: resize or crop the frames."
            )
        config = self.config
        if self._parallel_config is not None and (
            config.ff_conv or config.spatial_position == "rope" or config.moving_layers
        ):
            raise ValueError(
                "Context parallelism splits the patches and does not support `ff_conv`, `spatial_position='rope'` or "
                "`moving_layers`: use data parallelism."
            )
        return height // patch_size, width // patch_size

    def _last_history_frame(self, hidden_states: torch.Tensor, num_history_frames: int) -> torch.Tensor | None:
        """Return the last history frame (B, C, H, W) of a window for the moving layers, or None without them."""
        if not self.config.moving_layers:
            return None
        num_frames = hidden_states.shape[2]
        if not 0 < num_history_frames < num_frames:
            raise ValueError(
                f"`hidden_states` must have history frames and predicted frames, because `moving_layers` moves the last history "
                f"frame, got {num_frames} frames with {num_frames - num_history_frames} actions: pass at least one history frame, "
                "and one action per predicted frame."
            )
        return hidden_states[:, :, num_history_frames - 1]

    def _check_layer_inputs(
        self, batch_size: int, motion_noise: torch.Tensor | None, return_components: bool, memory: Memory | None
    ) -> None:
        wanted = (batch_size, self.config.moving_layers, 3)
        if not self.config.moving_layers and (return_components or motion_noise is not None or memory):
            raise ValueError("`return_components`, `motion_noise` and `memory` require a model with `moving_layers`.")
        if motion_noise is not None and motion_noise.shape != wanted:
            raise ValueError(
                f"`motion_noise` must be (batch, `moving_layers`, 3) = {wanted}, got {tuple(motion_noise.shape)}."
            )

    def _scale_noisy_latents(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, actions: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply predicted frames of latents (B, C, F, H, W) by the square root of their cumulative alpha.

        The timesteps are (B, F or 1).
        """
        share = self._cached(self._signal_share, hidden_states.device)[timestep.long()]  # (B, F or 1)
        if actions is not None:
            num_frames = hidden_states.shape[2]
            num_history_frames = num_frames - actions.shape[1]
            history = torch.ones_like(share[:, :1]).expand(-1, num_history_frames)
            share = torch.cat([history, share.expand(-1, num_frames)[:, num_history_frames:]], dim=1)
        return hidden_states * share[:, None, :, None, None].to(hidden_states.dtype)

    def _condition(
        self,
        timestep: torch.Tensor,
        actions: torch.Tensor | None,
        num_frames: int,
        action_mask: torch.Tensor | None,
        fps: float | torch.Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the conditions of the spatial blocks, the temporal blocks and the final layer.

        The timesteps are (B, F or 1). Each condition is (B, F or 1, D); with adaLN-single, the first two are
        (B, F or 1, 6 D).
        """
        if self.config.history_timestep == "zero" and actions is not None:
            predicted = torch.arange(num_frames, device=timestep.device) >= num_frames - actions.shape[1]
            timestep = timestep * predicted  # (B, F)
        temb = self.time_proj(timestep.flatten()).unflatten(0, timestep.shape)
        temb = self.time_embed(temb.to(dtype))
        if self.config.use_fps:
            temb = temb + self._embed_fps(fps, temb)
        action_temb = temb + self.encode_actions(actions, num_frames, action_mask, dtype)
        temporal_temb = action_temb if self.config.conditioning == "video" else temb
        final_temb = action_temb if self.config.final_frame_ada else temporal_temb
        if self.config.norm_type == "ada_norm_single":
            action_temb, temporal_temb = self.ada_norm_single(action_temb), self.ada_norm_single(temporal_temb)
        return action_temb, temporal_temb, final_temb

    def _modulate_out(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Normalize and modulate tokens (B, F, S, D) for the output layer."""
        if self.config.norm_type == "ada_norm_zero":
            modulation = self.ada_norm_out(temb)  # (B, F or 1, 2 D)
        else:
            modulation = torch.cat([temb, temb], dim=-1) + self.scale_shift_table.flatten().to(temb.device)
        # in a model split over GPUs, the last blocks may be on another device than the embeddings
        shift, scale = modulation.to(hidden_states.device).unsqueeze(2).chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm_out(hidden_states), 1 + scale)

    def _project_out(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Convert tokens (B, F, S, D) to latents (B, C, F, H, W)."""
        hidden_states = self.proj_out(hidden_states)  # (B, F, S, patch patch C)
        patch_size = self.config.patch_size
        hidden_states = hidden_states.unflatten(3, (patch_size, patch_size, -1)).unflatten(2, grid)
        hidden_states = hidden_states.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C, F, rows, patch, columns, patch)
        return hidden_states.flatten(5, 6).flatten(3, 4)

    def _embed_fps(self, fps: float | torch.Tensor | None, temb: torch.Tensor) -> torch.Tensor:
        fps = self.config.fps if fps is None else fps
        if fps is None:
            raise ValueError(
                "`fps` must be given, because this model embeds frames per second and its config has none: pass `fps`."
            )
        frequencies = self.time_proj(torch.as_tensor(fps, device=temb.device).float().reshape(-1))
        return self.fps_embed(frequencies.to(temb.dtype)).unsqueeze(1)  # (B or 1, 1, D)

    def _run(self, block: nn.Module, *inputs: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _cached(self, build: Callable[..., Any], *arguments: Any) -> Any:
        """Return `build(*arguments)`, cached until the config changes.

        Nothing is cached in compiled graphs, which have their own constants.
        """
        if torch.compiler.is_compiling():
            return build(*arguments)
        if self._tables_config is not self.config:
            self._tables, self._tables_config = {}, self.config
        key = (build.__name__, *arguments)
        if key not in self._tables:
            with torch.inference_mode(False):  # autograd does not support tensors created in inference mode
                self._tables[key] = build(*arguments)
        return self._tables[key]

    def _action_scaling(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset (A,) of the action space, float32."""
        space = self.action_space
        scale, offset = (
            torch.tensor(values, dtype=torch.float32, device=device) for values in (space.scale, space.offset)
        )
        return scale, offset

    def _signal_share(self, device: torch.device) -> torch.Tensor:
        """Return square roots of the cumulative alphas of all timesteps (T,), as in diffusers' schedulers."""
        config, number = self.config, self.config.num_train_timesteps
        if config.beta_schedule == "squaredcos_cap_v2":
            edges = torch.arange(number + 1, dtype=torch.float32, device=device) / number
            bar = torch.cos((edges + 0.008) / 1.008 * torch.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
        else:
            power = 2 if config.beta_schedule == "scaled_linear" else 1
            first, last = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
            betas = torch.linspace(first, last, number, device=device) ** power
        return (1 - betas).cumprod(0).sqrt()

    def _spatial_positions(
        self, rows: int, columns: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return sines and cosines of the patch positions (1, S, D); those of the columns come first."""
        config, exact = self.config, maybe_adjust_dtype_for_device(torch.float64, device)
        down, across = (torch.arange(number, dtype=exact, device=device) for number in (rows, columns))
        if config.base_patch_size is not None:  # centers of the patches in units of the pretrained grid
            ratio = config.patch_size / config.base_patch_size
            down, across = (down + 0.5) * ratio - 0.5, (across + 0.5) * ratio - 0.5
        if config.spatial_position == "area":
            side = round((rows * columns) ** 0.5)
            area = (rows * columns) ** 0.5 * config.patch_size / 64  # 64 latent pixels are 512 pixels in Open-Sora
            down, across = down * side / rows / area, across * side / columns / area
        elif config.spatial_position == "fixed":
            side = 64 // config.patch_size  # Latte's grid has 64x64 latent pixels
            down, across = down * side / rows, across * side / columns
        grid = torch.meshgrid(across, down, indexing="xy")
        dim = config.num_attention_heads * config.attention_head_dim
        return get_2d_sincos_pos_embed_from_grid(dim, torch.stack(grid)).float().to(dtype).unsqueeze(0)

    def _spatial_rotary_positions(
        self, rows: int, columns: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (S, head_dim) of rotary positions.

        Channel k of the first half of a head is paired with channel k of the second half. The first half of these pairs is
        rotated by the row, the second half by the column.
        """
        dim, exact = self.config.attention_head_dim // 2, maybe_adjust_dtype_for_device(torch.float64, device)
        frequencies = 100.0 ** -(torch.arange(0, dim, 2, dtype=exact, device=device) / dim)
        down = torch.arange(rows, device=device).repeat_interleave(columns)
        across = torch.arange(columns, device=device).repeat(rows)
        angles = torch.cat(
            [torch.outer(down.to(exact), frequencies), torch.outer(across.to(exact), frequencies)], dim=-1
        )
        angles = torch.cat([angles, angles], dim=-1)  # (S, head_dim)
        return angles.cos().float(), angles.sin().float()

    def _temporal_positions(
        self, num_frames: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return sines and cosines of the frame index (F, 1, D)."""
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        frames = torch.arange(num_frames, device=device)
        return get_1d_sincos_pos_embed_from_grid(dim, frames).float().to(dtype).unsqueeze(1)

    def _rotary_positions(self, num_frames: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (F, head_dim) of interleaved rotary positions."""
        frames = torch.arange(num_frames, device=device)
        return get_1d_rotary_pos_embed(self.config.attention_head_dim, frames, use_real=True)


def check_config(config: Any) -> None:
    """Check the config of an `IRASimTransformer3DModel`.

    Raises:
        ValueError: If an entry is invalid, or entries are inconsistent.
    """
    check_shared_config(config)
    if config.scale_noisy_latents and config.prediction_type == "flow_prediction":
        raise ValueError("`scale_noisy_latents` must be False with flow_prediction, which has no alphas.")
    if config.moving_layers and not supports_moving_layers(config):
        raise ValueError(
            "`moving_layers` predicts frames from the last history frame: it requires `conditioning`, `prediction_type` and "
            "`relative_latents` ('frame', 'sample', True), got "
            f"{(config.conditioning, config.prediction_type, config.relative_latents)}."
        )
    if config.target_extent is not None:
        _check_target_extent(config)
    if config.temporal_position == "rope" and config.attention_head_dim % 2:
        raise ValueError(
            f"`attention_head_dim` must be even with `temporal_position='rope'`, got {config.attention_head_dim}."
        )
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    if config.spatial_position != "rope" and heads * head_dim % 4:  # sines and cosines of two coordinates
        raise ValueError(
            "`num_attention_heads` times `attention_head_dim` must be divisible by 4 without `spatial_position='rope'`, got "
            f"{heads} times {head_dim}."
        )
    if config.spatial_position == "rope" and config.attention_head_dim % 4:
        raise ValueError(
            f"`attention_head_dim` must be divisible by 4 with `spatial_position='rope'`, got {config.attention_head_dim}."
        )


def supports_moving_layers(config: Mapping[str, Any]) -> bool:
    """Return whether a model with the other entries of a config can have moving layers."""
    kind = (config["conditioning"], config["prediction_type"], config["relative_latents"])
    return kind == ("frame", "sample", True)


def check_shared_config(config: Any) -> None:
    """Check the config entries that the transformer and the U-Net share.

    Raises:
        ValueError: If an entry is invalid, or entries are inconsistent.
    """
    for name, most in LIMITS.items():
        value = config.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"`{name}` must be an integer of at least 1 and at most {most}, got {value!r:.60}.")
    window = config.in_channels * config.sample_frames * config.sample_height * config.sample_width
    if window > MAX_WINDOW:
        raise ValueError(
            f"`in_channels` x `sample_frames` x `sample_height` x `sample_width` must be at most {MAX_WINDOW}, got {window}: a "
            "window must fit into memory."
        )
    if config.num_history_frames >= config.sample_frames:
        raise ValueError(
            f"`num_history_frames` must be less than `sample_frames` = {config.sample_frames}, which includes the predicted "
            f"frames, got {config.num_history_frames}."
        )
    for name, (low, high) in RANGES.items():
        value = config.get(name)
        kind, wanted = (int, "an integer") if name in INTEGERS else (int | float, "a number")
        if value is None and (name in ("fps", "base_patch_size") or name not in config):
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"`{name}` must be {wanted} in [{low:g}, {high:g}], got {value!r:.60}.")
    if config.cameras is not None and not _are_rows_of_names(config.cameras):
        raise ValueError(f"`cameras` must be rows of camera names, or None, got {config.cameras!r:.60}.")
    for name, choices in CHOICES.items():
        if name in config and config[name] not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {config[name]!r:.60}.")
    ActionSpace.from_config(config)


def _are_rows_of_names(rows: Any) -> bool:
    return (
        isinstance(rows, list | tuple)
        and len(rows) > 0
        and all(isinstance(row, list | tuple) and len(row) > 0 for row in rows)
        and all(isinstance(name, str) for row in rows for name in row)
    )


def _check_target_extent(config: Any) -> None:
    extent, space, conditioning = config.target_extent, config.action_space, config.conditioning
    numbers = isinstance(extent, list | tuple) and all(isinstance(edge, int | float) for edge in extent)
    left, top, right, bottom = extent if numbers and len(extent) == 4 else (0, 0, 0, 0)
    is_frame = -INF < left < right < INF and -INF < top < bottom < INF
    if not is_frame or (space, conditioning) != ("absolute", "frame") or config.action_dim < 2:
        raise ValueError(
            "`target_extent` must be the finite left, top, right and bottom edges of the frame, for a Frame-Ada model of "
            f"absolute actions that begin with a target position, got {extent!r:.60} with `action_space` {space!r}, `conditioning` "
            f"{conditioning!r} and `action_dim` {config.action_dim}."
        )


# caches that skip blocks read this registry
TransformerBlockRegistry.register(IRASimTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
