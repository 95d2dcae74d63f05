"""Strict conversion of pretrained weights, and changes to the architecture of a trained model."""

from .irasim import RELEASED_DATASETS, load_released_irasim
from .latte import load_latte
from .mapping import ConversionReport
from .opensora import load_opensora
from .surgery import (
    add_moving_layers,
    can_adapt,
    change_action_dim,
    change_autoencoder,
    change_patch_size,
    fit_autoencoder,
    predict_samples,
    scaled_latents,
)

__all__ = [
    "RELEASED_DATASETS",
    "ConversionReport",
    "add_moving_layers",
    "can_adapt",
    "change_action_dim",
    "change_autoencoder",
    "change_patch_size",
    "fit_autoencoder",
    "load_latte",
    "load_opensora",
    "load_released_irasim",
    "predict_samples",
    "scaled_latents",
]
