"""The figures of one clip."""

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
from .protocols import Protocol


@dataclass(frozen=True)
class Backbones:
    """Pretrained networks, each where it is asked for; see `metrics.load_lpips` and so on."""

    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    inception: Callable[[np.ndarray], np.ndarray] | None = None
    i3d: Callable[[np.ndarray], np.ndarray] | None = None
    device: Any = "cpu"  # of LPIPS


def score_clip(
    data: ClipData,
    prediction: Prediction,
    protocol: Protocol,
    encode: Callable[[np.ndarray], torch.Tensor] | None = None,
    backbones: Backbones = Backbones(),
) -> dict[str, Any]:
    """Every figure of one clip; history is never scored.

    Args:
        data: The clip.
        prediction: Its prediction.
        protocol: Says how frames are compared.
        encode: Scaled latents (C, T, h, w) of frames; without it there is no latent L2. A prediction that brings no
            latents is encoded too, as the release does with models of pixels.
        backbones: LPIPS, if any.

    Returns:
        `psnr`, `ssim` and `lpips` of each frame, `clip_psnr` and `latent_l2` of the clip; the same, but for the last two, of
        repeating the last frame seen, in `last_frame`.
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
    data: ClipData, prediction: Prediction, protocol: Protocol, backbones: Backbones
) -> dict[str, np.ndarray]:
    """Features of FID (n, 2048) and FVD (1, 400), predicted and true; as released, the true video twice (2, 400)."""
    features = {}
    if backbones.inception is not None:
        features["fid_prediction"] = backbones.inception(prediction.frames)
        features["fid_truth"] = backbones.inception(data.truth)
    if backbones.i3d is not None:
        truths = [data.truth, data.truth[:, :, ::-1]] if protocol.as_released else [data.truth]
        features["fvd_prediction"] = backbones.i3d(prediction.frames)[None]
        features["fvd_truth"] = np.stack([backbones.i3d(video) for video in truths])
    return features


def _compare(data: ClipData, frames: np.ndarray, protocol: Protocol) -> dict[str, Any]:
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
    """PSNR in which equal pictures count as if one of their `size` values were off by one, the least error there is."""
    return np.minimum(decibels, 10 * np.log10(255.0**2 * size))


def through_mp4(history: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Frames (n, H, W, 3), uint8, as they come out of the mp4 that the IRASim release scores.

    The release writes history and prediction through imageio with its defaults: H.264 of rate factor 25, colours at half
    the resolution, 4 frames a second.

    Raises:
        ValueError: If a side is not divisible by 16: imageio would resize the video.
    """
    _, height, width, _ = frames.shape
    if height % 16 or width % 16:
        raise ValueError(
            f"frames must have sides divisible by 16 for irasim-short-release, got {height}x{width}: take irasim-short."
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
