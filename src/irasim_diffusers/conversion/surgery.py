"""Changes to trained models: patch size, autoencoder, actions, prediction type and output layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..latents import Autoencoder, encode_images, scale_latents
from ..models import IRASimTransformer3DModel
from ..models.transformer_irasim import supports_moving_layers

ACTION_ENTRIES = {
    "action_scale": 1.0,
    "action_offset": 0.0,
    "action_names": None,
    "action_units": None,
    "action_low": None,
    "action_high": None,
    "action_space": "relative",
    "action_derivation": "recorded",
    "target_extent": None,
}
"""Config entries that describe the actions of one robot, with their values for unknown actions."""


def can_adapt(config: Mapping[str, Any], flag: str, value: Any) -> bool:
    """Return whether `irasim adapt` can change a config entry of a model to `value`."""
    if flag == "prediction_type":
        return (config[flag], value) == ("v_prediction", "sample")
    if flag == "moving_layers":
        return config[flag] == 0 and supports_moving_layers(config)
    has_grid = (config["conditioning"], config["spatial_position"], config["moving_layers"]) == ("frame", "grid", 0)
    return has_grid and (flag == "patch_size" or (flag == "action_frequencies" and value > config[flag]))


@torch.no_grad()
def change_patch_size(
    model: IRASimTransformer3DModel, patch_size: int, action_frequencies: int | None = None
) -> IRASimTransformer3DModel:
    """Change the patch size and, optionally, the action frequencies of a trained model.

    Large patches are cheap to train; small patches give sharp images. Patches keep their position in the image. The
    layers that read and write patches are interpolated around the center of a patch. (FlexiViT,
    https://arxiv.org/abs/2212.08013, changes the scale of the patches instead.) The model must then be trained briefly.

    Args:
        model: The trained model, Frame-Ada with `spatial_position="grid"` and without moving layers.
        patch_size: Side of the new patches, in latent pixels.
        action_frequencies: Number of octaves of the actions' sine and cosine features. Added octaves have no effect until the
            model is trained. None to keep the number.

    Returns:
        A new model. The input model is not modified.

    Raises:
        ValueError: If the model is not Frame-Ada with grid positions or has moving layers, if octaves would be removed, or if an argument is
            out of range.
    """
    config = model.config
    before = config["action_frequencies"]
    after = before if action_frequencies is None else action_frequencies
    for name, wanted in (("conditioning", "frame"), ("spatial_position", "grid"), ("moving_layers", 0)):
        if config[name] != wanted:
            raise ValueError(
                f"the patch size and action frequencies of this model cannot be changed: its `{name}` must be {wanted!r}, got "
                f"{config[name]!r}."
            )
    if after < before:
        raise ValueError(f"`action_frequencies` must be at least {before}, as in the model, got {after}.")
    old = config["patch_size"]
    new = IRASimTransformer3DModel.from_config(
        config,
        patch_size=patch_size,
        base_patch_size=config["base_patch_size"] or old,
        action_frequencies=after,
    )
    state = model.state_dict()
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = _crop(kernel, patch_size) * (old / patch_size) ** 2
    for name in ("proj_out.weight", "proj_out.bias"):  # rows: vertical position, horizontal position, channel
        rows = state[name].reshape(old, old, config["in_channels"], -1).permute(3, 2, 0, 1)
        state[name] = _crop(rows, patch_size).permute(2, 3, 1, 0).reshape(-1, *state[name].shape[1:])
    name = "action_embed.linear_1.weight"
    state[name] = _add_octaves(state[name], config["action_dim"], before, after)
    new.load_state_dict(state)
    return new


def _add_octaves(weight: torch.Tensor, action_dim: int, before: int, after: int) -> torch.Tensor:
    """Return `weight` (D, A (1 + 2 before)) with columns of zeros for the added octaves.

    The result is (D, A (1 + 2 after)).
    """
    raw, waves = weight.split([action_dim, 2 * action_dim * before], dim=1)
    octaves = waves.unflatten(1, (2, action_dim, before)) if before else waves.new_zeros(len(weight), 2, action_dim, 0)
    added = octaves.new_zeros(*octaves.shape[:-1], after - before)
    return torch.cat([raw, torch.cat([octaves, added], dim=-1).flatten(1)], dim=1)


def predict_samples(model: IRASimTransformer3DModel) -> IRASimTransformer3DModel:
    """Change a model that predicts velocities to one that predicts samples.

    A sample prediction does not have to pass the noise of high-resolution latents through the width of the model. At the last
    timestep, a velocity is the negated sample, so the output layer is negated. The model must then be trained briefly.

    Args:
        model: The trained model, with `prediction_type="v_prediction"`.

    Returns:
        A new model. The input model is not modified.

    Raises:
        ValueError: If the model has another prediction type.
    """
    if model.config.prediction_type != "v_prediction":
        raise ValueError(f"`model` must predict velocities (v_prediction), got {model.config.prediction_type!r}.")
    new = IRASimTransformer3DModel.from_config(model.config, prediction_type="sample")
    new.load_state_dict(
        {name: -value if name.startswith("proj_out.") else value for name, value in model.state_dict().items()}
    )
    return new


@torch.no_grad()
def add_moving_layers(model: IRASimTransformer3DModel, num_layers: int) -> IRASimTransformer3DModel:
    """Add moving layers to a trained model; see `MovingLayers`.

    The new layers are almost empty and do not move, so that predictions normally do not change until the model is trained. The
    prediction of the trained model becomes the generated frame.

    Args:
        model: The trained model without moving layers, Frame-Ada with `prediction_type="sample"` and `relative_latents`.
        num_layers: Number of moving layers, at most one for each object.

    Returns:
        A new model in the dtype of the input model, which is not modified.

    Raises:
        ValueError: If the model has moving layers or is of another kind, or the number is invalid.
    """
    if num_layers < 1:
        raise ValueError(f"`num_layers` must be at least 1, got {num_layers}.")
    if model.config["moving_layers"]:
        raise ValueError(f"`model` must have no moving layers, got {model.config['moving_layers']}.")
    new = IRASimTransformer3DModel.from_config(model.config, moving_layers=num_layers).to(model.dtype)
    new.load_state_dict(new.state_dict() | model.state_dict())
    return new


def change_autoencoder(
    model: IRASimTransformer3DModel, patch_size: int, before: torch.Tensor, after: torch.Tensor
) -> IRASimTransformer3DModel:
    """Adapt a trained model to the latents of another autoencoder.

    The layers that read and write patches are composed with linear maps between the patches of the two autoencoders. The maps
    are fitted to images by least squares. The model must then be trained briefly.

    Args:
        model: The trained model.
        patch_size: Side of the new patches, in new latent pixels. A patch must cover the same area of the image as before.
        before: Scaled latents (N, C, h, w) of some images from the autoencoder of the model.
        after: Scaled latents (N, C', h', w') of the same images from the new autoencoder.

    Returns:
        A new model for latents of the size of `after`. The input model is not modified.

    Raises:
        ValueError: If the model has moving layers, if the numbers of images or the grids of patches differ, if latents are not
            finite or all zero, or if `patch_size` or the size of the latents is out of range.
    """
    config, old = model.config, model.config["patch_size"]
    if config["moving_layers"]:
        raise ValueError("`model` must have no moving layers: train a new model for the autoencoder.")
    grids = [(len(x), x.shape[2] / size, x.shape[3] / size) for x, size in ((before, old), (after, patch_size))]
    if grids[0] != grids[1]:
        raise ValueError(
            f"`after` must have as many images and patches as `before`, {grids[0]}, got {grids[1]} (images, rows, "
            "columns): choose `patch_size` so that a patch covers the same area of the image as before, and images that consist "
            "of whole patches."
        )
    for name, latents in (("before", before), ("after", after)):
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(f"`{name}` must be finite latents, got NaN or infinite values: check the autoencoder.")
        if not bool(latents.any()):
            raise ValueError(
                f"`{name}` must be latents that depend on the images, got only zeros: check the autoencoder."
            )
    base = config["base_patch_size"]
    new = IRASimTransformer3DModel.from_config(
        config,
        base_patch_size=None if base is None else base * patch_size / old,
        patch_size=patch_size,
        in_channels=after.shape[1],
        sample_height=after.shape[2],
        sample_width=after.shape[3],
    )
    new.load_state_dict(_map_patches(model.state_dict(), old, patch_size, before, after))
    return new


@torch.no_grad()
def fit_autoencoder(
    model: IRASimTransformer3DModel, own: Autoencoder, other: Autoencoder, images: torch.Tensor
) -> IRASimTransformer3DModel:
    """Adapt a trained model to another autoencoder by a fit on images; see `change_autoencoder`.

    Args:
        model: The trained model.
        own: Autoencoder of the model.
        other: The new autoencoder.
        images: A few hundred images (N, 3, H, W) in [-1, 1] from different episodes of the model's data.

    Returns:
        A new model for frames of the size of `images`. Its patches cover the same area of the image as before. The input model
        is not modified.

    Raises:
        ValueError: If patches of the new latents cannot cover the same area, if latents are not finite or all zero, or if the new patch
            size or the size of the latents is out of range.
    """
    before, after = (scaled_latents(vae, images) for vae in (own, other))
    patch_size, remainder = divmod(model.config.patch_size * after.shape[-1], before.shape[-1])
    if remainder or not patch_size:
        raise ValueError(
            f"`other` must allow patches that cover the same area as the model's patches of {model.config.patch_size} latent "
            f"pixels, got latents {tuple(after.shape[1:])} instead of {tuple(before.shape[1:])}: use another autoencoder."
        )
    return change_autoencoder(model, patch_size, before, after)


@torch.no_grad()
def scaled_latents(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Encode images (N, 3, H, W) in [-1, 1] to scaled latents, float32 on the CPU."""
    latents = [encode_images(vae, part.to(vae.device)).float().cpu() for part in images.split(16)]
    return scale_latents(vae, torch.cat(latents))


def _map_patches(
    state: dict[str, torch.Tensor], old: int, new: int, before: torch.Tensor, after: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Compose the patch layers of a state with linear maps between old and new patches."""
    patches_before, patches_after = _patches(before, old), _patches(after, new)
    kernel = state["patch_embed.proj.weight"]
    read = kernel.flatten(1).double() @ _least_squares(patches_after, patches_before).T
    state["patch_embed.proj.weight"] = read.unflatten(1, (-1, new, new)).to(kernel)
    write = _least_squares(patches_before, patches_after).T
    for name in ("proj_out.weight", "proj_out.bias"):  # rows: vertical position, horizontal position, channel
        rows = state[name].reshape(old, old, before.shape[1], -1).permute(2, 0, 1, 3)
        rows = (write @ rows.flatten(0, 2).double()).reshape(after.shape[1], new, new, -1)
        state[name] = rows.permute(1, 2, 0, 3).reshape(-1, *state[name].shape[1:]).to(state[name])
    return state


def _patches(latents: torch.Tensor, size: int) -> torch.Tensor:
    """Return the patches (N rows columns, C size size) of latents (N, C, h, w), in float64."""
    return torch.nn.functional.unfold(latents.double(), size, stride=size).transpose(1, 2).flatten(0, 1)


def _least_squares(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Solve the ridge regression from rows of `given` to rows of `wanted`."""
    gram = given.T @ given
    damping = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + damping, given.T @ wanted)


def change_action_dim(model: IRASimTransformer3DModel, action_dim: int) -> IRASimTransformer3DModel:
    """Adapt a trained model to a robot with other actions.

    The action encoder is new. Before training, it maps every action to the null action.

    Args:
        model: The trained model.
        action_dim: Number of components of the new actions.

    Returns:
        A new model, whose config entries in `ACTION_ENTRIES` have the values given there. The input model is not modified.

    Raises:
        ValueError: If `action_dim` is out of range.
    """
    new = IRASimTransformer3DModel.from_config(model.config, action_dim=action_dim, **ACTION_ENTRIES)
    encoder = ("action_embed.", "trajectory_embed.", "target_embed.")
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(encoder)}
    new.load_state_dict(state, strict=False)
    last = getattr(new, "trajectory_embed", new.action_embed).linear_2
    torch.nn.init.zeros_(last.weight)
    last.bias.data.copy_(new.null_action)
    return new.to(model.dtype)


def _crop(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """Interpolate kernels (..., old, old) in a centered window of `size` pixels, at the same scale."""
    places = (torch.arange(size, device=kernel.device) - (size - 1) / 2) * 2 / max(kernel.shape[-1] - 1, 1)
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1).to(kernel)
    sampled = torch.nn.functional.grid_sample(
        kernel.flatten(0, -3).unsqueeze(0), grid.unsqueeze(0), padding_mode="border", align_corners=True
    )
    return sampled[0].unflatten(0, kernel.shape[:-2])
