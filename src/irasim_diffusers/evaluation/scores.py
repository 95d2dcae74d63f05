"""Metrics of one clip."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch

from ..data import read_video
from ..metrics import frame_lpips, frame_psnr, frame_ssim, gray, latent_l2, psnr
from .predictors import ClipData, Prediction
from .protocols import EvaluationProtocol


@dataclass(frozen=True)
class Backbones:
    """Pretrained networks of optional metrics; see `metrics.load_lpips`, `load_inception` and `load_i3d`."""

    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    inception: Callable[[np.ndarray], np.ndarray] | None = None
    i3d: Callable[[np.ndarray], np.ndarray] | None = None
    device: Any = "cpu"  # device of LPIPS


def score_clip(
    data: ClipData,
    prediction: Prediction,
    protocol: EvaluationProtocol,
    encode: Callable[[np.ndarray], torch.Tensor] | None = None,
    backbones: Backbones = Backbones(),
) -> dict[str, Any]:
    """Compute the metrics of one clip, without FID and FVD. History frames are never scored.

    Args:
        data: The clip.
        prediction: The prediction for the clip.
        protocol: Defines how frames are compared.
        encode: Function from frames to scaled latents (C, T, h, w); None omits latent L2. Predictions without latents are
            encoded too, as the script of the release does for pixel-space models.
        backbones: Optional networks, of which LPIPS is used.

    Returns:
        `psnr` and `ssim` of each frame and `clip_psnr`, also in `last_frame` for repeating the last history frame. With LPIPS,
        `lpips` of each frame; with `encode`, `latent_l2`; if known, `network_evaluations` of the prediction. The PSNR of equal
        frames is finite: as if one value differed by one gray level.

    Raises:
        ValueError: If frames or latents of prediction and truth differ in shape, a side of the frames is less than 7 pixels, or
            `protocol.as_released` is set and the sides are not divisible by 16.
    """
    repeated = np.broadcast_to(data.history[-1], data.truth.shape)
    figures = _compare(data, prediction.frames, protocol) | {"last_frame": _compare(data, repeated, protocol)}
    if encode is not None:
        latents = encode(prediction.frames) if prediction.latents is None else prediction.latents
        figures["latent_l2"] = float(latent_l2(latents.cpu(), encode(data.truth)))
    if backbones.lpips is not None:
        distances = frame_lpips(backbones.lpips, prediction.frames / 255, data.truth / 255, backbones.device)
        figures["lpips"] = distances.tolist()
    if prediction.network_evaluations is not None:
        figures["network_evaluations"] = prediction.network_evaluations
    return figures


def features_of_clip(
    data: ClipData, prediction: Prediction, protocol: EvaluationProtocol, backbones: Backbones
) -> dict[str, np.ndarray]:
    """Return FID features (n, 2048) and FVD features (1, 400), predicted and true, of the given networks.

    With `protocol.as_released` there are two true videos, and their FVD features are (2, 400).
    """
    features = {}
    if backbones.inception is not None:
        features["fid_prediction"] = backbones.inception(prediction.frames)
        features["fid_truth"] = backbones.inception(data.truth)
    if backbones.i3d is not None:
        truths = [data.truth, data.truth[:, :, ::-1]] if protocol.as_released else [data.truth]
        features["fvd_prediction"] = backbones.i3d(prediction.frames)[None]
        features["fvd_truth"] = np.stack([backbones.i3d(video) for video in truths])
    return features


def _compare(data: ClipData, frames: np.ndarray, protocol: EvaluationProtocol) -> dict[str, Any]:
    truth = data.truth
    whole = _finite(psnr(frames / 255, truth / 255), truth.size)
    if protocol.as_released:
        frames, truth = (gray(through_mp4(data.history, video)) for video in (frames, truth))
    frames, truth = frames / 255, truth / 255
    return {
        "psnr": _finite(frame_psnr(frames, truth), truth[0].size).tolist(),
        "ssim": frame_ssim(frames, truth).tolist(),
        "clip_psnr": float(whole),
    }


def _finite(decibels: np.ndarray, size: int) -> np.ndarray:
    """Cap the PSNR of identical images at the value for a single error of 1/255 in `size` values."""
    return np.minimum(decibels, 10 * np.log10(255.0**2 * size))


def through_mp4(history: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Compress and decode frames (n, H, W, 3), uint8, like the mp4 files that the IRASim release scores.

    The release writes history and prediction at 4 frames per second with the defaults of imageio: H.264 with rate factor 25 and
    half the color resolution.

    Raises:
        ValueError: If a side is not divisible by 16, because imageio would resize the video.
    """
    _, height, width, _ = frames.shape
    if height % 16 or width % 16:
        raise ValueError(
            f"frames must have sides divisible by 16 for irasim-short-release, got {height}x{width}: use irasim-short."
        )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=4, options={"crf": "25"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in np.concatenate([history, frames]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    return read_video(buffer)[len(history) :]
