"""Metrics: frame quality, feature distributions, faithfulness, agreement with the real environment."""

from .agreement import agreement, mmrv, pearson, spearman
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
    "agreement",
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
    "mmrv",
    "motion",
    "pearson",
    "psnr",
    "sensitivity_maps",
    "similar_clips",
    "spearman",
    "summarise_faithfulness",
]
