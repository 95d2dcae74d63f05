"""Metrics of frame quality, feature distributions and action faithfulness."""

from .backbones import load_i3d, load_inception, load_lpips
from .distribution import fid, frechet_distance, fvd
from .faithfulness import (
    ALTERATIONS,
    STRATA,
    Counterfactuals,
    action_faithfulness,
    counterfactual_actions,
    future_errors,
    identified,
    motion,
    sensitivity_maps,
    similar_clips,
    summarise_faithfulness,
)
from .frame import frame_lpips, frame_psnr, frame_ssim, gray, latent_l2, psnr
from .intervals import bootstrap

__all__ = [
    "ALTERATIONS",
    "STRATA",
    "Counterfactuals",
    "action_faithfulness",
    "bootstrap",
    "counterfactual_actions",
    "fid",
    "frame_lpips",
    "frame_psnr",
    "frame_ssim",
    "frechet_distance",
    "future_errors",
    "fvd",
    "gray",
    "identified",
    "latent_l2",
    "load_i3d",
    "load_inception",
    "load_lpips",
    "motion",
    "psnr",
    "sensitivity_maps",
    "similar_clips",
    "summarise_faithfulness",
]
