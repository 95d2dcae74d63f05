"""Agreement between the scores of policies in a world model and in the real environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats


def pearson(real: np.ndarray, model: np.ndarray) -> float:
    """Pearson correlation of policy scores (P,); NaN if all scores of one environment are equal.

    Arguments and errors are those of `mmrv`.
    """
    return float(_correlations(*_check(real, model)))


def spearman(real: np.ndarray, model: np.ndarray) -> float:
    """Spearman rank correlation of policy scores (P,); NaN if all scores of one environment are equal.

    Arguments and errors are those of `mmrv`.
    """
    return float(_rank_correlations(*_check(real, model)))


def mmrv(real: np.ndarray, model: np.ndarray) -> float:
    """Mean maximum rank violation (SIMPLER, https://arxiv.org/abs/2405.05941).

    It is 0 if the model ranks all policies as the real environment does. A pair of policies that is ranked differently
    costs the difference between the real scores. The maximum cost of each policy is averaged over the policies.

    Args:
        real: Scores in the real environment (P,), such as success rates.
        model: Scores in the world model (P,).

    Raises:
        ValueError: If the scores are not two vectors of the same length, at least 2, or are not finite.
    """
    return float(_rank_violations(*_check(real, model)))


def agreement(
    real: np.ndarray, model: np.ndarray, rng: np.random.Generator, num_samples: int = 2000
) -> dict[str, dict[str, Any]]:
    """Pearson, Spearman and MMRV of the mean scores of policies, with 95 % bootstrap intervals.

    The intervals resample the seeds, together for all policies and both environments, because the episodes are paired. They do
    not account for the choice of the policies. Samples with an undefined correlation are left out. For at least 4 policies and
    a defined correlation, `fisher_low` and `fisher_high` are the 95 % interval of Pearson's correlation by Fisher's
    transformation, which treats the policies as the sample.

    Args:
        real: Score of each episode in the real environment (P, n).
        model: Score of the episode with the same seed in the world model (P, n).
        rng: Random generator that draws the samples.
        num_samples: Number of samples with replacement.

    Returns:
        For each metric, `value`, `low`, `high` and the number of policies `n`; NaN is replaced by None.

    Raises:
        ValueError: If the scores are not two matrices of the same shape, with at least 2 policies and 1 seed, or are not finite,
            or if `num_samples` is less than 1.
    """
    real, model = np.asarray(real, dtype=float), np.asarray(model, dtype=float)
    if real.ndim != 2 or real.shape != model.shape or len(real) < 2 or not real.shape[1]:
        raise ValueError(
            f"`real` and `model` must both be (P, n) with P at least 2 and n at least 1, got {real.shape} and {model.shape}."
        )
    _check_finite(real, model)
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    draws = rng.integers(real.shape[1], size=(num_samples, real.shape[1]))
    samples = [np.stack([scores[:, draw].mean(1) for draw in draws]) for scores in (real, model)]
    means = real.mean(1), model.mean(1)
    metrics = {"pearson": _correlations, "spearman": _rank_correlations, "mmrv": _rank_violations}
    found: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        values = metric(*samples)
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (np.nan, np.nan)
        found[name] = _numbers(value=float(metric(*means)), low=low, high=high) | {"n": len(real)}
    value = found["pearson"]["value"]
    if value is not None and len(real) >= 4:
        with np.errstate(divide="ignore"):  # the transform of 1 is infinite
            ends = np.arctanh(value) + stats.norm.ppf([0.025, 0.975]) / np.sqrt(len(real) - 3)
        found["pearson"] |= _numbers(fisher_low=np.tanh(ends[0]), fisher_high=np.tanh(ends[1]))
    return found


def _correlations(real: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Pearson correlations of scores (..., P) as (...); NaN where the scores of one environment are equal."""
    constant = (np.ptp(real, -1) == 0) | (np.ptp(model, -1) == 0)
    product = _standardised(real) * _standardised(model)
    return np.where(constant, np.nan, product.sum(-1).clip(-1, 1))


def _standardised(scores: np.ndarray) -> np.ndarray:
    """Scores (..., P) with mean 0 and norm 1 over the policies; 0 for equal scores."""
    scores = scores / np.abs(scores).max(-1, keepdims=True).clip(
        np.finfo(float).tiny
    )  # products neither overflow nor vanish
    scores = scores - scores.mean(-1, keepdims=True)
    return scores / np.linalg.norm(scores, axis=-1, keepdims=True).clip(np.finfo(float).tiny)


def _rank_correlations(real: np.ndarray, model: np.ndarray) -> np.ndarray:
    return _correlations(stats.rankdata(real, axis=-1), stats.rankdata(model, axis=-1))


def _rank_violations(real: np.ndarray, model: np.ndarray) -> np.ndarray:
    """MMRV of scores (..., P) as (...)."""
    differences = np.abs(real[..., :, None] - real[..., None, :])
    violated = (model[..., :, None] < model[..., None, :]) != (real[..., :, None] < real[..., None, :])
    return (differences * violated).max(axis=-1).mean(axis=-1)


def _check(real: np.ndarray, model: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, model = np.asarray(real, dtype=float), np.asarray(model, dtype=float)
    if real.ndim != 1 or real.shape != model.shape or len(real) < 2:
        raise ValueError(
            f"`real` and `model` must both be (P,) with P at least 2, got {real.shape} and {model.shape}."
        )
    _check_finite(real, model)
    return real, model


def _check_finite(real: np.ndarray, model: np.ndarray) -> None:
    if not (np.isfinite(real).all() and np.isfinite(model).all()):
        raise ValueError("`real` and `model` must be finite, got NaN or infinite scores.")


def _numbers(**values: float) -> dict[str, float | None]:
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
