"""Conversion of Latte-1 in the format of diffusers (maxin-cn/Latte-1) to initial weights."""

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
    count,
    head_dim,
    is_action,
    require,
    without_sigma,
    zero_actions,
)

PREFIXES = {
    "pos_embed.proj.": "patch_embed.proj.",
    "adaln_single.emb.timestep_embedder.": "time_embed.",
    "adaln_single.linear.": "ada_norm_single.1.",
}


def load_latte(
    path: str | os.PathLike, *, report: ConversionReport | None = None, **config: Any
) -> IRASimTransformer3DModel:
    """Load the weights of Latte-1, except its text layers, as initial weights.

    Before training, the model computes the same function as Latte without cross-attention and ignores the actions.

    Args:
        path: The folder `transformer`, or its safetensors file.
        report: Filled with the mapping of the tensors.
        config: As for `load_opensora`, except that `num_attention_heads` is 16 by default.

    Returns:
        The model, float32.

    Raises:
        ValueError: If the file is not such a checkpoint, if `config` is invalid, or if tensors are unknown, missing or not finite,
            or have the wrong shape (up to 100 are listed).
    """
    state = read_safetensors(Path(path))
    require(state, "Latte", {"pos_embed.proj.weight": 4, "proj_out.weight": 2, "adaln_single.linear.weight": 2})
    width, channels, patch_size, _ = state["pos_embed.proj.weight"].shape
    heads = config.get("num_attention_heads", 16)
    derived = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim(width, heads),
        "num_layers": count(state, "transformer_blocks."),
        "in_channels": channels,
        "patch_size": patch_size,
        "norm_type": "ada_norm_single",
        "spatial_position": "fixed",
        "final_frame_ada": True,
    }
    model = build(derived | config, state, _convert_tensor, report, new=is_action)
    zero_actions(model)
    return model


def _convert_tensor(key: str, tensor: torch.Tensor, model: IRASimTransformer3DModel) -> Conversion:
    if key.startswith("caption_projection.") or ".attn2." in key:
        return "text"
    if key.startswith("proj_out.") and tensor.ndim:
        return {key: without_sigma(tensor, model)}
    for prefix, target in PREFIXES.items():
        if key.startswith(prefix):
            return {key.replace(prefix, target): tensor}
    known = key == "scale_shift_table" or key.startswith(("transformer_blocks.", "temporal_transformer_blocks."))
    return {key: tensor} if known else None
