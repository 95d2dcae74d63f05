"""Distances between the distributions of predicted and true images and videos."""

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray, ddof: int = 1) -> float:
    """Compute the Fréchet distance between two sets of features.

    The features are modeled as normal distributions. For centered features A and B, the trace of the square root of the product
    of their covariances is the sum of the singular values of A B^T. No matrix square root is computed, so the result is also
    exact for few samples and singular covariances.

    Args:
        first: Features (N, D).
        second: Features (M, D).
        ddof: 1 divides covariances by N - 1 (pytorch-fid), 0 by N (StyleGAN-V).

    Returns:
        The squared distance, at least 0, computed in float64.

    Raises:
        ValueError: If the features are not two matrices with the same D, are too few, or are not finite.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"`first` and `second` must be (N, D) and (M, D), got {first.shape} and {second.shape}.")
    if min(len(first), len(second)) <= ddof:
        raise ValueError(
            f"`first` and `second` must have at least {ddof + 1} samples each, got {len(first)} and {len(second)}."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("`first` and `second` must be finite, got NaN or inf: run the feature network in float32.")
    difference = first.mean(axis=0) - second.mean(axis=0)
    one, other = _covariance_root(first, ddof), _covariance_root(second, ddof)
    shared = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return max(float(difference @ difference + np.square(one).sum() + np.square(other).sum() - 2 * shared), 0.0)


def fid(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute FID as in pytorch-fid, from features (N, 2048) and (M, 2048) of `load_inception`.

    Errors are those of `frechet_distance`.
    """
    return frechet_distance(prediction, truth, ddof=1)


def fvd(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Compute FVD as in StyleGAN-V, from I3D features (N, 400) and (M, 400) of `load_i3d`.

    Errors are those of `frechet_distance`.
    """
    return frechet_distance(prediction, truth, ddof=0)


def _covariance_root(features: np.ndarray, ddof: int) -> np.ndarray:
    """Return a matrix R with at most D rows such that R^T R is the covariance."""
    centered = (features - features.mean(axis=0)) / np.sqrt(len(features) - ddof)
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(centered) > centered.shape[1] else centered
