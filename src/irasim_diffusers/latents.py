"""Scaling of an autoencoder's latents."""

from typing import Any, TypeGuard

import torch

MAX_FACTOR = 1e30
"""Limit of the scaling factor and the shift, within the range of float32."""


def check_latent_scaling(vae: Any) -> None:
    """Check the scaling of an autoencoder's latents.

    Raises:
        ValueError: If the factor is not a positive number, or the shift is neither a finite number nor None.
    """
    shift, factor = getattr(vae.config, "shift_factor", None), getattr(vae.config, "scaling_factor", None)
    if not _is_finite(factor) or factor <= 0:
        raise ValueError(
            f"`scaling_factor` of the autoencoder must be a positive number, got {factor!r}: set it to 1 / the standard "
            "deviation of its latents."
        )
    if shift is not None and not _is_finite(shift):
        raise ValueError(f"`shift_factor` of the autoencoder must be a finite number or None, got {shift!r}.")


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_FACTOR


def latent_scaling(vae: Any) -> tuple[float, float]:
    """Return the shift and the factor of scaled latents, `(latents - shift) * factor`."""
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Convert latents of the autoencoder to scaled ones, the unit of the transformer."""
    shift, factor = latent_scaling(vae)
    return (latents - shift) * factor


def unscale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Convert scaled latents to those of the autoencoder, the inverse of `scale_latents`."""
    shift, factor = latent_scaling(vae)
    return latents / factor + shift
