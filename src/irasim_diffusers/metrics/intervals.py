"""Bootstrap confidence intervals."""

from typing import Any

import numpy as np
from scipy import stats


def bootstrap(
    values: np.ndarray, rng: np.random.Generator, statistic: Any = np.mean, num_samples: int = 2000
) -> dict[str, float]:
    """Compute a statistic with its 95 % percentile bootstrap interval.

    Args:
        values: Values (n,), one per independent unit such as a clip.
        rng: Random generator that draws the samples.
        statistic: `numpy.mean`, `numpy.median` or another function with an `axis` argument. Its name is the key of its value.
        num_samples: Number of samples with replacement.

    Returns:
        The statistic under its name, `low`, `high` and `n`.

    Raises:
        ValueError: If the values are not a vector with at least one entry.
    """
    values = np.asarray(values)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"`values` must be (n,) with n at least 1, got {values.shape}.")
    sample = np.resize(values, max(len(values), 2))  # SciPy requires two values
    low, high = stats.bootstrap(
        (sample,), statistic, n_resamples=num_samples, vectorized=True, method="percentile", random_state=rng
    ).confidence_interval
    return {statistic.__name__: float(statistic(values)), "low": float(low), "high": float(high), "n": len(values)}
