"""Conversion of the released IRASim checkpoints (https://github.com/bytedance/IRASim)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from ..models import PRESETS, IRASimTransformer3DModel
from ..safe_load import check_weights, read_checkpoint
from .mapping import Conversion, ConversionReport, build, computed, count, head_dim, require

ARM = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
ARM_UNITS = ["m", "m", "m", "rad", "rad", "rad", "opening 0 to 1"]
RELEASED_DATASETS: dict[str, dict[str, Any]] = {
    name: {
        "sample_height": 32,
        "sample_width": 40,
        "action_dim": 7,
        "action_scale": [20.0] * 6 + [1.0],
        "action_names": ARM,
        "action_units": ARM_UNITS,
        "action_low": [None] * 6 + [0.0],
        "action_high": [None] * 6 + [1.0],
        "action_derivation": "relative_euler",
        "fps": fps,
    }
    for name, fps in (("rt1", 3.0), ("bridge", 5.0))
} | {
    "languagetable": {
        "sample_height": 36,
        "sample_width": 64,
        "action_dim": 2,
        "action_scale": [20.0, 20.0],
        "action_names": ["x", "y"],
        "action_units": ["m", "m"],
        "action_activation": None,
        "fps": 10.0,
    }
}
"""Latent size, action space and frame rate of each released dataset, as in the dataset classes of the release."""

EMA_DRIFT = 1e-3
"""Tolerance for position tables. The release also applies EMA to its fixed tables, which changes them by about 2e-4."""

PARTS = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "embed_state.fc1": "action_embed.linear_1",
    "embed_state.fc2": "action_embed.linear_2",
    "embed_arm_state": "action_embed.linear_1",
    "embed_state": "action_embed.linear_2",
    "mlp.fc1": "trajectory_embed.linear_1",
    "mlp.fc2": "trajectory_embed.linear_2",
    "final_layer.adaLN_modulation.1": "ada_norm_out.1",
    "final_layer.linear": "proj_out",
}
BLOCK_PARTS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "ada_norm.1",
}


def load_released_irasim(
    path: str | os.PathLike,
    dataset: str,
    *,
    final_frame_ada: bool = False,
    weights: str = "ema",
    report: ConversionReport | None = None,
    **config: Any,
) -> IRASimTransformer3DModel:
    """Load a checkpoint of the IRASim release.

    Width, depth, patch size, window and conditioning (Frame-Ada or Video-Ada) are derived from the weights; the action space, the
    latent size and the frame rate from the dataset. No code in the file is executed.

    Args:
        path: `.pt` file with `model` and `ema`, or with the weights only.
        dataset: `"rt1"`, `"bridge"` or `"languagetable"`.
        final_frame_ada: Whether the final layer of Frame-Ada is conditioned on the actions. False for the published files.
        weights: Which weights to load: `"ema"` or `"model"`; without effect on a file with the weights only.
        report: Filled with the mapping of the tensors.
        config: Config entries that replace derived ones, such as `num_attention_heads` for a width that is not in the paper.

    Returns:
        The model, float32, in evaluation mode.

    Raises:
        ValueError: If an argument is invalid, if the file is not such a checkpoint, or if tensors are unknown, missing or not
            finite, or have the wrong shape (up to 100 are listed).
    """
    if dataset not in RELEASED_DATASETS:
        raise ValueError(f"`dataset` must be one of {sorted(RELEASED_DATASETS)}, got {dataset!r}.")
    if weights not in ("ema", "model"):
        raise ValueError(f"`weights` must be ema or model, got {weights!r}.")
    state = _read_state(Path(path), weights)
    derived = _derive_config(state, RELEASED_DATASETS[dataset] | config, final_frame_ada)
    return build(derived, state, _convert_tensor, report).eval()


def _read_state(path: Path, weights: str) -> dict[str, torch.Tensor]:
    content = read_checkpoint(path)
    if weights in content:
        state = content[weights]
    elif all(torch.is_tensor(value) for value in content.values()):
        state = content
    else:
        raise ValueError(
            f"{str(path)!r} contains no {weights!r} weights, only {sorted(content)!r:.200}: change `weights` (--weights), or use a "
            "file with `model`, `ema` or tensors only."
        )
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{str(path)!r} contains no weights: it must contain a dictionary of tensors by name.")
    check_weights(state, path)
    renamed = {key.removeprefix("module."): value for key, value in state.items()}
    if len(renamed) < len(state):
        raise ValueError(
            f"{str(path)!r} has tensors of one name with and without the prefix 'module.': remove one of each pair."
        )
    return renamed


def _derive_config(state: dict[str, torch.Tensor], known: dict[str, Any], final_frame_ada: bool) -> dict[str, Any]:
    require(state, "IRASim", {"x_embedder.proj.weight": 4, "temp_embed": 3, "blocks.1.attn.qkv.weight": 2})
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    encoder = state.get("embed_state.fc1.weight")
    joint = encoder is not None and encoder.ndim == 2 and encoder.shape[1] != known["action_dim"]
    video = "mlp.fc1.weight" in state or joint
    heads = {
        size["num_attention_heads"] * size["attention_head_dim"]: size["num_attention_heads"]
        for size in PRESETS.values()
    }
    if width not in heads and "num_attention_heads" not in known:
        raise ValueError(
            f"`num_attention_heads` is required for width {width}, which is not a preset of the paper ({sorted(heads)})."
        )
    derived = {
        "num_attention_heads": heads.get(width),
        "num_layers": count(state, "blocks.") // 2,
        "in_channels": channels,
        "patch_size": patch_size,
        "sample_frames": state["temp_embed"].shape[1],
        "conditioning": "video" if video else "frame",
        "final_frame_ada": False if video else final_frame_ada,
    } | known
    return derived | {"attention_head_dim": head_dim(width, derived["num_attention_heads"])}


def _convert_tensor(key: str, tensor: torch.Tensor, model: IRASimTransformer3DModel) -> Conversion:
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    if key == "pos_embed":
        rows, columns = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        shape = (1, rows * columns, width)
        return computed(tensor, shape, lambda: model._spatial_positions(rows, columns), EMA_DRIFT)
    if key == "temp_embed":
        frames = config.sample_frames
        shape = (1, frames, width)
        return computed(tensor, shape, lambda: model._temporal_positions(frames).transpose(0, 1), EMA_DRIFT)
    if key == "mask_emb_fn.weight":
        return {"null_action": tensor.reshape(-1)}
    part, _, kind = key.rpartition(".")
    if part in PARTS:
        return {f"{PARTS[part]}.{kind}": tensor}
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", part)
    if match is None:
        return None
    number, inner = match.groups()
    stack = "temporal_transformer_blocks" if int(number) % 2 else "transformer_blocks"
    block = f"{stack}.{int(number) // 2}"
    if inner == "attn.qkv" and tensor.ndim and tensor.shape[0] % 3 == 0:
        names = (f"{block}.attn1.to_{name}.{kind}" for name in "qkv")
        return dict(zip(names, tensor.chunk(3), strict=True))
    return {f"{block}.{BLOCK_PARTS[inner]}.{kind}": tensor} if inner in BLOCK_PARTS else None
