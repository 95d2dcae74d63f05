"""Scale the latents of an autoencoder."""

from typing import Any, TypeGuard

import torch

MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6
"""Range of the scaling factor; latents in bfloat16 and float32 keep their digits within it."""
MAX_SHIFT = 1e6


def check_latent_scaling(vae: Any) -> None:
    """Check the scaling of an autoencoder's latents.

    Raises:
        ValueError: If the factor or the shift is not a number, or is out of range. The shift may be None.
    """
    shift, factor = getattr(vae.config, "shift_factor", None), getattr(vae.config, "scaling_factor", None)
    if not _is_number(factor) or not MIN_FACTOR <= factor <= MAX_FACTOR:
        raise ValueError(
            f"`scaling_factor` of the autoencoder must be a positive number, got {factor!r}: set it to 1 / the standard deviation "
            f"of its latents, in [{MIN_FACTOR:g}, {MAX_FACTOR:g}]."
        )
    if shift is not None and not (_is_number(shift) and abs(shift) <= MAX_SHIFT):
        raise ValueError(
            f"`shift_factor` of the autoencoder must be a number in [{-MAX_SHIFT:g}, {MAX_SHIFT:g}] or None, got {shift!r}."
        )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def latent_scaling(vae: Any) -> tuple[float, float]:
    """Return the shift and the factor of scaled latents, `(latents - shift) * factor`."""
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scale latents of the autoencoder for the transformer."""
    shift, factor = latent_scaling(vae)
    return (latents - shift) * factor


def unscale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Convert scaled latents to latents of the autoencoder, the inverse of `scale_latents`."""
    shift, factor = latent_scaling(vae)
    return latents / factor + shift
