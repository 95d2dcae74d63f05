"""Metrics of frames against frames."""

import numpy as np


def psnr(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR of the mean error of each clip, in dB.

    The error is averaged over all frames before the logarithm, so that single static frames, whose error is almost
    nil, do not blow it up, as they do in a mean of PSNRs of frames.

    Args:
        prediction: Frames (..., T, H, W, 3) in [0, 1].
        truth: As `prediction`.

    Returns:
        PSNR of each clip (...), in dB; infinite where the two are equal.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"`prediction` and `truth` must have one shape, got {prediction.shape} and {truth.shape}.")
    error = np.square(prediction.astype(np.float64) - truth).mean(axis=(-4, -3, -2, -1))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)
