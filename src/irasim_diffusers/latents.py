"""Scaling of an autoencoder's latents."""

from typing import Any

import torch


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
