"""Conversion of Open-Sora 1.2 (STDiT3, hpcai-tech/OpenSora-STDiT-v3) to initial weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..models import IRASimTransformer3DModel
from ..safe_load import read_safetensors
from .mapping import (
    Conversion,
    ConversionReport,
    build,
    computed,
    count,
    head_dim,
    is_action,
    require,
    without_sigma,
    zero_actions,
)

PARTS = {
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "fps_embedder.mlp.0": "fps_embed.linear_1",
    "fps_embedder.mlp.2": "fps_embed.linear_2",
    "t_block.1": "ada_norm_single.1",
}
BLOCK_PARTS = {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
STACKS = {"spatial_blocks": "transformer_blocks", "temporal_blocks": "temporal_transformer_blocks"}


def load_opensora(
    path: str | os.PathLike, *, report: ConversionReport | None = None, **config: Any
) -> IRASimTransformer3DModel:
    """Load the weights of Open-Sora 1.2 (STDiT3), except its text layers, as initial weights.

    Before training, the model computes the same function as STDiT3 without cross-attention, except that the velocity has the
    opposite sign, as in diffusers. It ignores the actions: the last layer of the action encoder and the null action are zero.
    Sample with `FlowMatchEulerDiscreteScheduler`.

    Args:
        path: `model.safetensors`, or a folder of safetensors files.
        report: Filled with the mapping of the tensors.
        config: Action space, latent size, number of frames and frame rate of the training data: `action_dim`, `action_scale`,
            `sample_height`, `sample_width`, `sample_frames`, `fps` and so on; also `num_attention_heads`, which is required for
            weights without query and key norms.

    Returns:
        The model, float32.

    Raises:
        ValueError: If the file is not such a checkpoint, if `config` is invalid, or if tensors are unknown, missing or not finite,
            or have the wrong shape (up to 100 are listed).
    """
    state = read_safetensors(Path(path))
    model = build(_derive_config(state, config), state, _convert_tensor, report, new=is_action)
    zero_actions(model)
    return model


def _derive_config(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    require(
        state,
        "Open-Sora",
        {"x_embedder.proj.weight": 5, "final_layer.linear.weight": 2, "spatial_blocks.0.attn.qkv.weight": 2},
    )
    width, channels, _, patch_size, _ = state["x_embedder.proj.weight"].shape
    norm = state.get("spatial_blocks.0.attn.q_norm.weight")
    if norm is None and "num_attention_heads" not in config:
        raise ValueError(
            "the number of heads cannot be derived from weights without query and key norms: pass `num_attention_heads`."
        )
    if norm is not None and (norm.ndim != 1 or norm.numel() < 2):
        raise ValueError(
            f"'spatial_blocks.0.attn.q_norm.weight' must contain a value per channel of a head, got shape {tuple(norm.shape)}."
        )
    heads = config.get("num_attention_heads", None if norm is None else width // norm.numel())
    derived = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim(width, heads),
        "num_layers": count(state, "spatial_blocks."),
        "in_channels": channels,
        "patch_size": patch_size,
        "norm_type": "ada_norm_single",
        "qk_norm": None if norm is None else "rms_norm",
        "temporal_position": "rope",
        "spatial_position": "area",
        "use_fps": True,
        "history_timestep": "zero",
        "final_frame_ada": True,
        "prediction_type": "flow_prediction",
    }
    return derived | config


def _convert_tensor(key: str, tensor: torch.Tensor, model: IRASimTransformer3DModel) -> Conversion:
    if key.startswith("y_embedder.") or ".cross_attn." in key:
        return "text"
    if key == "rope.freqs":
        dim = model.config.attention_head_dim
        return computed(tensor, ((dim + 1) // 2,), lambda: 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    if key == "x_embedder.proj.weight":
        return {"patch_embed.proj.weight": tensor.squeeze(2)}
    if key == "x_embedder.proj.bias":
        return {"patch_embed.proj.bias": tensor}
    if key == "final_layer.scale_shift_table":
        return {"scale_shift_table": tensor}
    part, _, kind = key.rpartition(".")
    if part == "final_layer.linear":  # the velocity of diffusers has the opposite sign
        return {f"proj_out.{kind}": -without_sigma(tensor, model)} if tensor.ndim else None
    if part in PARTS:
        return {f"{PARTS[part]}.{kind}": tensor}
    return _convert_block(key, tensor)


def _convert_block(key: str, tensor: torch.Tensor) -> Conversion:
    stack, _, rest = key.partition(".")
    number, _, inner = rest.partition(".")
    if stack not in STACKS:
        return None
    block = f"{STACKS[stack]}.{number}"
    if inner == "scale_shift_table":
        return {f"{block}.scale_shift_table": tensor}
    name, _, kind = inner.rpartition(".")
    if name == "attn.qkv" and tensor.ndim and tensor.shape[0] % 3 == 0:
        names = (f"{block}.attn1.to_{letter}.{kind}" for letter in "qkv")
        return dict(zip(names, tensor.chunk(3), strict=True))
    return {f"{block}.{BLOCK_PARTS[name]}.{kind}": tensor} if name in BLOCK_PARTS else None
