"""Load autoencoders, encode images, and scale latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch

from .safe_load import find_nonfinite_weight

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

Autoencoder: TypeAlias = "AutoencoderKL | AutoencoderTiny"
AUTOENCODER = "the folder or Hub id of an AutoencoderKL or AutoencoderTiny"
"""What the argument of an autoencoder must be, for error messages."""

MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6
"""Range of the scaling factor; latents in bfloat16 and float32 keep their precision within it."""
MAX_SHIFT = 1e6
AUTOENCODER_LIMITS = {"latent_channels": 1024, "layers_per_block": 64}
"""Upper limits of numbers in the config of an autoencoder."""
LEVEL_LIMITS = {
    "num_encoder_blocks": 64,
    "num_decoder_blocks": 64,
    "block_out_channels": 16384,
    "encoder_block_out_channels": 16384,
    "decoder_block_out_channels": 16384,
}
"""Upper limits of numbers that the config of an autoencoder contains for each resolution."""
MAX_BLOCKS = 8
"""Maximum number of resolutions of an autoencoder."""


def check_sizes(config: Mapping[str, Any]) -> None:
    """Check the sizes in the config of an autoencoder, which limit its memory.

    Raises:
        ValueError: If a list is empty or has more than `MAX_BLOCKS` entries, or a size is out of range or not an integer.
    """
    for key in config.keys() & AUTOENCODER_LIMITS.keys():
        most, size = AUTOENCODER_LIMITS[key], config[key]
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(f"`{key}` of the autoencoder must be an integer in [1, {most}], got {size!r:.60}.")
    for key in config.keys() & LEVEL_LIMITS.keys():
        most, sizes = LEVEL_LIMITS[key], config[key]
        valid = isinstance(sizes, list | tuple) and 1 <= len(sizes) <= MAX_BLOCKS
        if not valid or not all(type(size) is int and 1 <= size <= most for size in sizes):
            raise ValueError(
                f"`{key}` of the autoencoder must be 1 to {MAX_BLOCKS} integers in [1, {most}], got {sizes!r:.60}."
            )


def check_latent_scaling(vae: Any) -> None:
    """Check the scaling of an autoencoder's latents.

    Raises:
        ValueError: If the factor, the shift, or the mean or standard deviation of a channel is missing, not a number or out of
            range, or if the autoencoder has both a nonzero shift and channel means. The shift may be None, and so may the means
            and standard deviations together.
    """
    shift, factor, mean, std = latent_scaling(vae)
    if not _is_number(factor) or not MIN_FACTOR <= factor <= MAX_FACTOR:
        raise ValueError(
            f"`scaling_factor` of the autoencoder must be a number in [{MIN_FACTOR:g}, {MAX_FACTOR:g}], got {factor!r:.40}: set it "
            "to 1 / the standard deviation of its latents."
        )
    if shift is not None and not (_is_number(shift) and abs(shift) <= MAX_SHIFT):
        raise ValueError(
            f"`shift_factor` of the autoencoder must be a number in [{-MAX_SHIFT:g}, {MAX_SHIFT:g}] or None, got {shift!r:.40}."
        )
    if mean is None and std is None:
        return
    channels = vae.config.latent_channels
    for name, values, low in (("latents_mean", mean, -MAX_SHIFT), ("latents_std", std, MIN_FACTOR)):
        valid = isinstance(values, list | tuple) and len(values) == channels
        if not valid or not all(_is_number(value) and low <= value <= MAX_SHIFT for value in values):
            raise ValueError(
                f"`{name}` of the autoencoder must be a list of {channels} numbers in [{low:g}, {MAX_SHIFT:g}], one for each "
                f"channel of the latents, got {values!r:.100}."
            )
    if shift:
        raise ValueError(f"`shift_factor` of the autoencoder must be None or 0 with `latents_mean`, got {shift!r}.")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def latent_scaling(vae: Any) -> tuple[Any, Any, Any, Any]:
    """Return the shift, the factor, and the mean and standard deviation of the channels.

    Each value is read from the config; it is None if the config does not contain it.
    """
    names = ("shift_factor", "scaling_factor", "latents_mean", "latents_std")
    shift, factor, mean, std = (getattr(vae.config, name, None) for name in names)
    return shift, factor, mean, std


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scale latents (N, C, ...) of the autoencoder for the transformer, as the pipelines of diffusers do.

    Returns:
        `(latents - shift) * factor`, or `(latents - mean) * factor / std` with the mean and the standard deviation of each
        channel if the autoencoder has them.
    """
    shift, factor = _affine(vae, latents)
    return (latents - shift) * factor


def unscale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Convert scaled latents to latents of the autoencoder, the inverse of `scale_latents`."""
    shift, factor = _affine(vae, latents)
    return latents / factor + shift


def load_any_autoencoder(name: str, subfolder: str | None = None, revision: str | None = None) -> Autoencoder:
    """Load an autoencoder of the class that its config names, from safetensors files, and check it.

    Args:
        name: Folder or Hub id.
        subfolder: Folder of the autoencoder in it.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the config names another class than AutoencoderKL and AutoencoderTiny, its sizes or the scaling of the
            latents are invalid, weights are missing, unknown or not finite, or images cannot be encoded and decoded.
        OSError: If the autoencoder is not found.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    options: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    config = AutoencoderKL.load_config(name, **options)
    classes = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found not in classes:
        raise ValueError(f"its config must name the class AutoencoderKL or AutoencoderTiny, got {found!r}.")
    check_sizes(config)
    vae, info = classes[found].from_pretrained(name, **options, use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the weights file does not contain {missing[0]}.")
    if unknown := sorted(info["unexpected_keys"]):
        raise ValueError(f"the config does not match the weights: {unknown[0]} is not a weight of this autoencoder.")
    if (damaged := find_nonfinite_weight(vae)) is not None:
        raise ValueError(f"weights must be finite, got NaN or infinity in {damaged}: use an earlier checkpoint.")
    check_latent_scaling(vae)
    _check_reconstruction(vae)
    return vae


@torch.no_grad()
def _check_reconstruction(vae: Autoencoder) -> None:
    """Check that the autoencoder encodes and decodes a small image of 2 x 3 latent pixels.

    Raises:
        ValueError: If it does not accept RGB images, or the latents or the reconstruction have the wrong shape or are not finite.
    """
    factor = downsampling_factor(vae)
    image = torch.linspace(-1, 1, 18 * factor**2, dtype=vae.dtype).view(1, 3, 2 * factor, 3 * factor)
    try:
        latents = encode_images(vae, image)
        decoded = vae.decode(latents).sample
    except RuntimeError as error:
        raise ValueError(f"it must encode and decode RGB images: {error}") from error
    shapes = tuple(latents.shape), tuple(decoded.shape)
    if shapes != (wanted := ((1, vae.config.latent_channels, 2, 3), tuple(image.shape))):
        raise ValueError(
            f"it must map an image of shape {wanted[1]} to latents of shape {wanted[0]} and back, got latents of shape "
            f"{shapes[0]} and an image of shape {shapes[1]}."
        )
    if not all(bool(torch.isfinite(each).all()) for each in (latents, decoded)):
        raise ValueError("its latents and its reconstruction of an image must be finite, got NaN or infinite values.")


def encode_images(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Encode images (N, 3, H, W) in [-1, 1] to unscaled latents (N, C, H / f, W / f).

    The latents of an AutoencoderKL are the means of its posterior.
    """
    encoded = vae.encode(images)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def downsampling_factor(vae: Any) -> int:
    """Return the ratio of the height of images to the height of their latents; 1 if `vae` is None."""
    config = vae.config if vae is not None else {}
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (None,)
    return 2 ** (len(levels) - 1)


def _affine(vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
    """Return the shift and the factor of scaled latents, numbers or tensors (C, 1, ...)."""
    shift, factor, mean, std = latent_scaling(vae)
    if mean is None:
        return shift or 0.0, factor
    shape = (-1,) + (1,) * (latents.ndim - 2)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=torch.float32).view(shape) for values in (mean, std)
    )
    return mean, factor / std
