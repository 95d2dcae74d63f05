"""Metrics between predicted and true frames."""

from collections.abc import Callable

import numpy as np
import torch

from ..version import INSTALL


def psnr(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR of each clip from its mean squared error, in dB.

    The error is averaged over all frames before the logarithm. In a mean of per-frame PSNRs, static frames with almost no
    error would dominate.

    Args:
        prediction: Frames (..., T, H, W, 3) in [0, 1].
        truth: True frames, same shape and range.

    Returns:
        PSNR of each clip (...), in dB; infinite if the clips are equal.

    Raises:
        ValueError: If the shapes differ.
    """
    return _decibels(_squared_error(prediction, truth).mean(axis=(-4, -3, -2, -1)))


def frame_psnr(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR of each frame, in dB; the paper reports its mean.

    Args:
        prediction: Frames (..., H, W, C) in [0, 1].
        truth: True frames, same shape and range.

    Returns:
        PSNR (...) as in scikit-image; infinite if two frames are equal.

    Raises:
        ValueError: If the shapes differ.
    """
    return _decibels(_squared_error(prediction, truth).mean(axis=(-3, -2, -1)))


def frame_ssim(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """SSIM of each frame with scikit-image: 7x7 window, mean over channels.

    Args:
        prediction: Frames (..., H, W, C) in [0, 1].
        truth: True frames, same shape and range.

    Returns:
        SSIM (...).

    Raises:
        ImportError: If scikit-image is not installed.
        ValueError: If the shapes differ, or a side is less than 7 pixels.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError(f"SSIM requires scikit-image: {INSTALL.format('evaluation')}.") from error
    _check_shapes(prediction, truth)
    size = prediction.shape[-3:]
    pairs = zip(prediction.reshape(-1, *size), truth.reshape(-1, *size), strict=True)
    values = [
        structural_similarity(one.astype(np.float64), other.astype(np.float64), data_range=1.0, channel_axis=-1)
        for one, other in pairs
    ]
    return np.array(values).reshape(prediction.shape[:-3])


def latent_l2(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean squared difference (...) of the scaled latents (..., C, T, h, w) of each clip, float64.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, truth)
    return (prediction.double() - truth.double()).square().mean(dim=(-4, -3, -2, -1))


def gray(frames: np.ndarray) -> np.ndarray:
    """Convert RGB frames (..., H, W, 3) to luma (..., H, W, 1), uint8, with the BT.601 weights of OpenCV."""
    weights = np.array([0.299, 0.587, 0.114])
    return np.rint(frames.astype(np.float64) @ weights).astype(np.uint8)[..., None]


@torch.no_grad()
def frame_lpips(
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prediction: np.ndarray,
    truth: np.ndarray,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """LPIPS of each frame of a clip.

    Args:
        network: Network of `load_lpips`, called with two batches (T, 3, H, W) in [-1, 1].
        prediction: Frames (T, H, W, 3) in [0, 1].
        truth: True frames, same shape and range.
        device: Device of the network.

    Returns:
        Distances (T,), float64.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, truth)
    pair = [
        torch.from_numpy(np.moveaxis(frames * 2.0 - 1, -1, -3)).to(device, torch.float32)
        for frames in (prediction, truth)
    ]
    return network(*pair).flatten().double().cpu().numpy()


def _squared_error(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    _check_shapes(prediction, truth)
    return np.square(prediction.astype(np.float64) - truth)


def _check_shapes(prediction: np.ndarray | torch.Tensor, truth: np.ndarray | torch.Tensor) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(
            f"`prediction` and `truth` must have the same shape, got {tuple(prediction.shape)} and {tuple(truth.shape)}."
        )


def _decibels(error: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)
