"""Foreign weights brought into this package's layout, strictly: every tensor finds its place, or nothing is converted."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .models import PRESETS, IRASimTransformer3DModel
from .models.transformer_irasim import ACTION_ENCODER

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
"""Data sets of the released weights: latent size, and the action space as the released data classes scale it."""


# the tensors here that a foreign one becomes, or why it is dropped, or None if it is unknown
Conversion: TypeAlias = dict[str, torch.Tensor] | str | None


@dataclass
class ConversionReport:
    """What became of the tensors of a file."""

    mapped: dict[str, list[str]] = field(default_factory=dict)  # foreign key -> keys here
    dropped: dict[str, str] = field(default_factory=dict)  # foreign key -> why it is not needed

    def __str__(self) -> str:
        """One line for each tensor of the file."""
        lines = [f"{key} -> {', '.join(targets)}" for key, targets in self.mapped.items()]
        return "\n".join(lines + [f"{key}: dropped, {reason}" for key, reason in self.dropped.items()])


def load_released_irasim(
    path: str | os.PathLike,
    dataset: str,
    *,
    final_frame_ada: bool = False,
    weights: str = "ema",
    report: ConversionReport | None = None,
    **config: Any,
) -> IRASimTransformer3DModel:
    """Read a checkpoint of the IRASim release (https://github.com/bytedance/IRASim).

    Width, depth, patch and conditioning (Frame-Ada or Video-Ada) are read off the weights, the action space is that of the
    data set. The checkpoint's pickle is read without running any code of it.

    Args:
        path: `.pt` file with `model` and `ema`, or of the weights alone.
        dataset: `"rt1"`, `"bridge"` or `"languagetable"`.
        final_frame_ada: Whether the final layer was trained to see the actions; not so in the published files.
        weights: `"ema"` or `"model"`.
        report: Filled with what mapped to what.
        config: Config entries that differ, such as `num_attention_heads` for a width that is none of the paper's.

    Returns:
        The model, float32, in evaluation mode.

    Raises:
        ValueError: If the file is no such checkpoint, or keys are unknown, missing or misshapen; all are listed.
    """
    if dataset not in RELEASED_DATASETS:
        raise ValueError(f"`dataset` must be one of {sorted(RELEASED_DATASETS)}, got {dataset!r}.")
    if weights not in ("ema", "model"):
        raise ValueError(f"`weights` must be ema or model, got {weights!r}.")
    state = _released_state(Path(path), weights)
    known = RELEASED_DATASETS[dataset] | config
    model = IRASimTransformer3DModel(**_released_config(state, known, final_frame_ada))
    _load(model, state, _released_key, report if report is not None else ConversionReport())
    return model.eval()


def _released_state(path: Path, weights: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "which does not exist"
        raise ValueError(f"`path` must be a checkpoint file, got {str(path)!r}, {found}.")
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(f"{str(path)!r} is a TorchScript program, not a checkpoint: loading it would run its code.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_inert_pickle())
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{str(path)!r} is no checkpoint that can be read safely: {error}") from error
    if isinstance(content, Mapping) and weights in content:
        content = content[weights]
    elif isinstance(content, Mapping) and not all(torch.is_tensor(value) for value in content.values()):
        raise ValueError(f"{str(path)!r} holds no {weights!r} weights; it has {sorted(map(str, content))}.")
    if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{str(path)!r} holds no weights: a dictionary of tensors is wanted.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _released_config(state: dict[str, torch.Tensor], known: dict[str, Any], final_frame_ada: bool) -> dict[str, Any]:
    _require(state, "IRASim", {"x_embedder.proj.weight": 4, "temp_embed": 3, "blocks.1.attn.qkv.weight": 2})
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    sample_frames = state["temp_embed"].shape[1]
    encoder = state.get("embed_state.fc1.weight")
    video = "mlp.fc1.weight" in state or (encoder is not None and encoder.shape[1] != known["action_dim"])
    heads = {
        size["num_attention_heads"] * size["attention_head_dim"]: size["num_attention_heads"]
        for size in PRESETS.values()
    }
    if width not in heads and "num_attention_heads" not in known:
        raise ValueError(f"width {width} is none of the paper's ({sorted(heads)}): give `num_attention_heads`.")
    derived = {
        "num_attention_heads": heads.get(width),
        "num_layers": _count(state, "blocks.") // 2,
        "in_channels": channels,
        "patch_size": patch_size,
        "sample_frames": sample_frames,
        "conditioning": "video" if video else "frame",
        "final_frame_ada": final_frame_ada and not video,
    } | known
    return derived | {"attention_head_dim": width // derived["num_attention_heads"]}


RELEASED_PARTS = {
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
RELEASED_BLOCK_PARTS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "ada_norm.1",
}


def _released_key(key: str, tensor: torch.Tensor, model: IRASimTransformer3DModel) -> Conversion:
    config = model.config
    if key == "pos_embed":
        grid = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        return _computed(tensor, model._spatial_positions(*grid), EMA_DRIFT)
    if key == "temp_embed":
        return _computed(tensor, model._temporal_positions(config.sample_frames).transpose(0, 1), EMA_DRIFT)
    if key == "mask_emb_fn.weight":
        return {"null_action": tensor.reshape(-1)}
    part, _, kind = key.rpartition(".")
    if part in RELEASED_PARTS:
        return {f"{RELEASED_PARTS[part]}.{kind}": tensor}
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", part)
    if match is None:
        return None
    number, inner = match.groups()
    stack = "temporal_transformer_blocks" if int(number) % 2 else "transformer_blocks"
    block = f"{stack}.{int(number) // 2}"
    if inner == "attn.qkv" and tensor.shape[0] % 3 == 0:
        names = (f"{block}.attn1.to_{name}.{kind}" for name in "qkv")
        return dict(zip(names, tensor.chunk(3), strict=True))
    return {f"{block}.{RELEASED_BLOCK_PARTS[inner]}.{kind}": tensor} if inner in RELEASED_BLOCK_PARTS else None


def load_opensora(
    path: str | os.PathLike, *, report: ConversionReport | None = None, **config: Any
) -> IRASimTransformer3DModel:
    """Start from Open-Sora 1.2 (STDiT3, hpcai-tech/OpenSora-STDiT-v3): all but its text is reused.

    Before training, the model computes what STDiT3 does without cross-attention, whatever the actions: the last layer of
    the action encoder and the null action are zero. Sample it with `FlowMatchEulerDiscreteScheduler`.

    Args:
        path: `model.safetensors`, or a folder with one.
        report: Filled with what mapped to what.
        config: The action space, size, frames and rate of the data to train on: `action_dim`, `action_scale`,
            `sample_height`, `sample_width`, `sample_frames`, `fps` and so on.

    Returns:
        The model, float32.

    Raises:
        ValueError: If keys are unknown, missing or misshapen; all are listed.
    """
    state = _safetensors_state(Path(path))
    _require(
        state,
        "Open-Sora",
        {"x_embedder.proj.weight": 5, "final_layer.linear.weight": 2, "spatial_blocks.0.attn.qkv.weight": 2},
    )
    width, channels, _, patch_size, _ = state["x_embedder.proj.weight"].shape
    normed = state.get("spatial_blocks.0.attn.q_norm.weight")
    if normed is None and "num_attention_heads" not in config:
        raise ValueError("weights without query and key norms do not tell their heads: give `num_attention_heads`.")
    heads = config.get("num_attention_heads") or width // len(normed)  # type: ignore[arg-type]
    derived = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": _count(state, "spatial_blocks."),
        "in_channels": channels,
        "patch_size": patch_size,
        "norm_type": "ada_norm_single",
        "qk_norm": None if normed is None else "rms_norm",
        "temporal_position": "rope",
        "spatial_position": "area",
        "use_fps": True,
        "history_timestep": "zero",
        "final_frame_ada": True,
        "prediction_type": "flow_prediction",
    }
    model = IRASimTransformer3DModel(**derived | config)
    _zero_actions(model)
    _load(model, state, _opensora_key, report if report is not None else ConversionReport(), new=_is_action)
    return model


def load_latte(
    path: str | os.PathLike, *, report: ConversionReport | None = None, **config: Any
) -> IRASimTransformer3DModel:
    """Start from Latte-1 in diffusers' format (maxin-cn/Latte-1): all but its text is reused.

    Before training, the model computes what Latte does without cross-attention, whatever the actions.

    Args:
        path: The `transformer` folder, or its safetensors file.
        report: Filled with what mapped to what.
        config: As for `load_opensora`; also `num_attention_heads`, 16 if not given.

    Returns:
        The model, float32.

    Raises:
        ValueError: If keys are unknown, missing or misshapen; all are listed.
    """
    state = _safetensors_state(Path(path))
    _require(state, "Latte", {"pos_embed.proj.weight": 4, "proj_out.weight": 2, "adaln_single.linear.weight": 2})
    width, channels, patch_size, _ = state["pos_embed.proj.weight"].shape
    heads = config.get("num_attention_heads", 16)
    derived = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": _count(state, "transformer_blocks."),
        "in_channels": channels,
        "patch_size": patch_size,
        "norm_type": "ada_norm_single",
        "spatial_position": "fixed",
        "final_frame_ada": True,
    }
    model = IRASimTransformer3DModel(**derived | config)
    _zero_actions(model)
    _load(model, state, _latte_key, report if report is not None else ConversionReport(), new=_is_action)
    return model


@torch.no_grad()
def change_patch_size(
    model: IRASimTransformer3DModel, patch_size: int, action_frequencies: int | None = None
) -> IRASimTransformer3DModel:
    """Go on with a trained model at another patch size: coarse patches learn cheaply, fine ones draw sharply.

    Positions keep their place in the picture, and the layers that read and write patches are interpolated about the middle
    of a patch (after FlexiViT, https://arxiv.org/abs/2212.08013, whose patches change scale instead). A short training
    lets the model settle.

    Args:
        model: The trained model, with `spatial_position="grid"`.
        patch_size: Side of the new patches, in latent pixels.
        action_frequencies: Octaves of sines and cosines that join the actions, at first without effect; None for as many as
            before.

    Returns:
        A new model; the given one is left as it is.

    Raises:
        ValueError: If the model's positions are not on the plain grid, or octaves would be lost.
    """
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    before = config["action_frequencies"]
    after = before if action_frequencies is None else action_frequencies
    if config["spatial_position"] != "grid" or after < before or config["conditioning"] != "frame":
        raise ValueError(
            "`model` must be of Frame-Ada with grid positions, and `action_frequencies` no fewer than it has, got "
            f"{config['conditioning']!r}, {config['spatial_position']!r} and {after} after {before}."
        )
    base = config["base_patch_size"] or config["patch_size"]
    new = IRASimTransformer3DModel(
        **config | {"patch_size": patch_size, "base_patch_size": base, "action_frequencies": after}
    )
    state = model.state_dict()
    old = config["patch_size"]
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = _crop(kernel, patch_size) * (old / patch_size) ** 2
    for name in ("proj_out.weight", "proj_out.bias"):  # rows: down, across, channel
        rows = state[name].reshape(old, old, config["in_channels"], -1).permute(3, 2, 0, 1)
        state[name] = _crop(rows, patch_size).permute(2, 3, 1, 0).reshape(-1, *state[name].shape[1:])
    columns = state["action_embed.linear_1.weight"]
    joined = new.state_dict()["action_embed.linear_1.weight"].zero_()
    dim = config["action_dim"]
    places = torch.arange(joined.shape[1])
    kind = (places - dim) // (dim * after) if after else places  # 0 for sines, 1 for cosines
    octave = (places - dim) % after if after else places
    kept = (places < dim) | ((kind >= 0) & (octave < before))
    joined[:, kept] = columns
    state["action_embed.linear_1.weight"] = joined
    new.load_state_dict(state)
    return new


def predict_samples(model: IRASimTransformer3DModel) -> IRASimTransformer3DModel:
    """Go on with a model of velocities as one of samples, which need not carry the noise of fine latents through its width.

    At the last timestep a velocity is the negated sample, so that the output is negated. A short training lets the model
    settle.

    Args:
        model: The trained model, with `prediction_type="v_prediction"`.

    Returns:
        A new model; the given one is left as it is.

    Raises:
        ValueError: If the model predicts something else.
    """
    if model.config.prediction_type != "v_prediction":
        raise ValueError(f"`model` must predict velocities (v_prediction), got {model.config.prediction_type!r}.")
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    new = IRASimTransformer3DModel(**config | {"prediction_type": "sample"})
    new.load_state_dict(
        {name: -value if name.startswith("proj_out.") else value for name, value in model.state_dict().items()}
    )
    return new


def change_autoencoder(
    model: IRASimTransformer3DModel, patch_size: int, before: torch.Tensor, after: torch.Tensor
) -> IRASimTransformer3DModel:
    """Go on with a trained model on the latents of another autoencoder.

    The layers that read and write patches are joined to linear maps between the patches of both, fitted to pictures by least
    squares. A short training lets the model settle.

    Args:
        model: The trained model.
        patch_size: Side of the new patches, in new latent pixels; a patch must cover as much of the picture as before.
        before: Scaled latents (N, C, h, w) of some pictures under the model's autoencoder.
        after: Scaled latents (N, C', h', w') of the same pictures under the other one.

    Returns:
        A new model; the given one is left as it is.

    Raises:
        ValueError: If the grids of patches differ.
    """
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    old = config["patch_size"]
    grids = [(len(x), x.shape[2] / size, x.shape[3] / size) for x, size in ((before, old), (after, patch_size))]
    if grids[0] != grids[1]:
        raise ValueError(
            f"`after` must have as many pictures and patches as `before`, {grids[0]}, got {grids[1]}: choose `patch_size` so that "
            "a patch covers as much of the picture as before."
        )
    if config["base_patch_size"] is not None:
        config["base_patch_size"] = config["base_patch_size"] * patch_size / old
    new = IRASimTransformer3DModel(
        **config
        | {
            "patch_size": patch_size,
            "in_channels": after.shape[1],
            "sample_height": after.shape[2],
            "sample_width": after.shape[3],
        }
    )
    patches_before, patches_after = _patches(before, old), _patches(after, patch_size)
    state = model.state_dict()
    kernel = state["patch_embed.proj.weight"]
    read = kernel.flatten(1).double() @ _least_squares(patches_after, patches_before).T
    state["patch_embed.proj.weight"] = read.unflatten(1, (-1, patch_size, patch_size)).to(kernel)
    write = _least_squares(patches_before, patches_after).T
    for name in ("proj_out.weight", "proj_out.bias"):  # rows: down, across, channel
        rows = state[name].reshape(old, old, config["in_channels"], -1).permute(2, 0, 1, 3)
        rows = (write @ rows.flatten(0, 2).double()).reshape(after.shape[1], patch_size, patch_size, -1)
        state[name] = rows.permute(1, 2, 0, 3).reshape(-1, *state[name].shape[1:]).to(state[name])
    new.load_state_dict(state)
    return new


def _patches(latents: torch.Tensor, size: int) -> torch.Tensor:
    """Patches (patches, C size size) of latents (N, C, h, w), in float64."""
    return torch.nn.functional.unfold(latents.double(), size, stride=size).transpose(1, 2).flatten(0, 1)


def _least_squares(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The matrix that brings rows of `given` nearest those of `wanted`, damped so that it does not blow up noise."""
    gram = given.T @ given
    damping = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + damping, given.T @ wanted)


def change_action_dim(model: IRASimTransformer3DModel, action_dim: int) -> IRASimTransformer3DModel:
    """Go on with a trained model on a robot with other actions: a new action encoder, which at first embeds all as the null action.

    Args:
        model: The trained model.
        action_dim: Components of the new actions.

    Returns:
        A new model without scale, names and `target_extent` of the actions. The input model is not modified.
    """
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    unknown = {"action_scale": 1.0, "action_offset": 0.0, "action_names": None, "action_units": None}
    unknown |= {"action_low": None, "action_high": None, "target_extent": None}
    new = IRASimTransformer3DModel(**config | {"action_dim": action_dim} | unknown)
    encoder = ("action_embed.", "trajectory_embed.", "target_embed.")
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(encoder)}
    new.load_state_dict(state, strict=False)
    last = getattr(new, "trajectory_embed", new.action_embed).linear_2
    torch.nn.init.zeros_(last.weight)
    last.bias.data.copy_(new.null_action)
    return new.to(model.dtype)


def _crop(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """Kernels (..., old, old) as seen through a window of `size` pixels about their middle, at the same scale."""
    places = (torch.arange(size, device=kernel.device) - (size - 1) / 2) * 2 / max(kernel.shape[-1] - 1, 1)
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1).to(kernel)
    sampled = torch.nn.functional.grid_sample(
        kernel.flatten(0, -3).unsqueeze(0), grid.unsqueeze(0), padding_mode="border", align_corners=True
    )
    return sampled[0].unflatten(0, kernel.shape[:-2])


def _safetensors_state(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"`path` must be a safetensors file or a folder with some, got {str(path)!r}.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            part = load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is no safetensors file (of shards give the folder, not the index): {error}"
            ) from error
        if twice := sorted(state.keys() & part.keys()):
            raise ValueError(
                f"{str(path)!r} holds {len(twice)} tensors more than once, {twice[0]} first: name one file, or leave one "
                "set of shards in the folder."
            )
        state |= part
    return state


def _require(state: dict[str, torch.Tensor], family: str, dimensions: dict[str, int]) -> None:
    """Refuse weights without the keys that tell their configuration, or with others under their names."""
    missing = [key for key, number in dimensions.items() if key not in state or state[key].ndim != number]
    if missing:
        raise ValueError(
            f"these are no {family} weights: {missing} missing, or of another dimension, among {len(state)} keys."
        )


def _count(state: dict[str, torch.Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _is_action(key: str) -> bool:
    return key.startswith(ACTION_ENCODER)


def _zero_actions(model: IRASimTransformer3DModel) -> None:
    """Let every action embed to zero, so that a pretrained model starts as what it was."""
    encoder = getattr(model, "trajectory_embed", model.action_embed)
    for parameter in (encoder.linear_2.weight, encoder.linear_2.bias, model.null_action):
        torch.nn.init.zeros_(parameter)


OPENSORA_PARTS = {
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "fps_embedder.mlp.0": "fps_embed.linear_1",
    "fps_embedder.mlp.2": "fps_embed.linear_2",
    "t_block.1": "ada_norm_single.1",
}
OPENSORA_BLOCK_PARTS = {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def _opensora_key(key: str, tensor: torch.Tensor, model: IRASimTransformer3DModel) -> Conversion:
    config = model.config
    if key.startswith("y_embedder.") or ".cross_attn." in key:
        return "text"
    if key == "rope.freqs":
        return _computed(
            tensor, 10000.0 ** (-torch.arange(0, config.attention_head_dim, 2) / config.attention_head_dim)
        )
    if key == "x_embedder.proj.weight":
        return {"patch_embed.proj.weight": tensor.squeeze(2)}
    if key == "x_embedder.proj.bias":
        return {"patch_embed.proj.bias": tensor}
    if key == "final_layer.scale_shift_table":
        return {"scale_shift_table": tensor}
    part, _, kind = key.rpartition(".")
    if part == "final_layer.linear":  # diffusers' velocity points the other way
        return {f"proj_out.{kind}": -_without_sigma(tensor, model)}
    if part in OPENSORA_PARTS:
        return {f"{OPENSORA_PARTS[part]}.{kind}": tensor}
    for stack, ours in (
        ("spatial_blocks.", "transformer_blocks"),
        ("temporal_blocks.", "temporal_transformer_blocks"),
    ):
        if key.startswith(stack):
            number, _, inner = key.removeprefix(stack).partition(".")
            block, (name, _, kind) = f"{ours}.{number}", inner.rpartition(".")
            if inner == "scale_shift_table":
                return {f"{block}.scale_shift_table": tensor}
            if name == "attn.qkv" and tensor.shape[0] % 3 == 0:
                return {
                    f"{block}.attn1.to_{letter}.{kind}": third
                    for letter, third in zip("qkv", tensor.chunk(3), strict=True)
                }
            if name in OPENSORA_BLOCK_PARTS:
                return {f"{block}.{OPENSORA_BLOCK_PARTS[name]}.{kind}": tensor}
    return None


EMA_DRIFT = 1e-3
"""The release averages its fixed tables with the weights, which moves them by some 2e-4 over its training."""


def _computed(tensor: torch.Tensor, table: torch.Tensor, tolerance: float = 1e-4) -> str | None:
    """Why a fixed table is dropped, if it is the one that the model computes itself."""
    if tensor.shape != table.shape or not tensor.is_floating_point():
        return None
    tolerance = max(tolerance, torch.finfo(tensor.dtype).eps)  # 16-bit files hold rounded tables
    gap = float((tensor.float() - table).abs().max())
    return f"computed here, differs by at most {gap:.1g}" if gap <= tolerance else None


def _latte_key(key: str, tensor: torch.Tensor, model: IRASimTransformer3DModel) -> Conversion:
    if key.startswith("caption_projection.") or ".attn2." in key:
        return "text"
    if key.startswith("proj_out."):
        return {key: _without_sigma(tensor, model)}
    for foreign, ours in (
        ("pos_embed.proj.", "patch_embed.proj."),
        ("adaln_single.emb.timestep_embedder.", "time_embed."),
        ("adaln_single.linear.", "ada_norm_single.1."),
    ):
        if key.startswith(foreign):
            return {key.replace(foreign, ours): tensor}
    known = key == "scale_shift_table" or key.startswith(("transformer_blocks.", "temporal_transformer_blocks."))
    return {key: tensor} if known else None


def _without_sigma(tensor: torch.Tensor, model: IRASimTransformer3DModel) -> torch.Tensor:
    """The rows that predict the mean, of a layer that predicts mean and variance, channel fastest."""
    channels = model.config.in_channels
    if tensor.shape[0] != 2 * channels * model.config.patch_size**2:
        return tensor  # misshapen: said by the caller
    return tensor.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)


def _load(
    model: IRASimTransformer3DModel,
    state: dict[str, torch.Tensor],
    convert: Callable[[str, torch.Tensor, IRASimTransformer3DModel], Conversion],
    report: ConversionReport,
    new: Callable[[str], bool] = lambda key: False,
) -> None:
    """Load converted weights; unknown, missing and misshapen keys stop it with a list. `new` keys stay as they are."""
    own = model.state_dict()
    converted: dict[str, torch.Tensor] = {}
    problems = []
    for key, tensor in state.items():
        result = convert(key, tensor, model)
        if isinstance(result, str):
            report.dropped[key] = result
            continue
        if result is None or not result.keys() <= own.keys():
            problems.append(f"{key} {tuple(tensor.shape)}: unknown, or unlike what its place computes")
            continue
        report.mapped[key] = list(result)
        converted |= result
        problems += [
            f"{key}: {tuple(value.shape)} where {target} is {tuple(own[target].shape)}"
            for target, value in result.items()
            if value.shape != own[target].shape
        ]
    problems += [
        f"nothing for {key} {tuple(value.shape)}"
        for key, value in own.items()
        if key not in converted and not new(key)
    ]
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit:\n" + "\n".join(problems))
    model.load_state_dict(own | {key: value.to(own[key].dtype) for key, value in converted.items()})


REBUILDERS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "dtype"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}
INERT_MODULES = (
    *("omegaconf", "typing", "builtins", "__builtin__", "collections", "copyreg", "copy_reg"),
    *("enum", "argparse", "pathlib", "numpy"),
)


class _Inert:
    """What stands for an object of a foreign class: it keeps nothing and runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors and containers; of settings objects that lie beside them it makes inert ones; refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in REBUILDERS or (module == "torch" and name.endswith("Storage")):
            return super().find_class(module, name)
        if module.split(".")[0] in INERT_MODULES:
            return _Inert
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def _inert_pickle() -> ModuleType:
    module = ModuleType("inert_pickle")
    module.Unpickler = _InertUnpickler  # type: ignore[attr-defined]
    module.load = lambda file, **kwargs: _InertUnpickler(file, **kwargs).load()  # type: ignore[attr-defined]
    return module
