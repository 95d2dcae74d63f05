"""Bootstrap confidence intervals."""

from typing import Any

import numpy as np


def bootstrap(
    values: np.ndarray, rng: np.random.Generator, statistic: Any = np.mean, num_samples: int = 2000
) -> dict[str, float]:
    """Mean, or another statistic, with a bootstrap 95 % interval.

    Args:
        values: One value for each independent unit (n,), such as a clip.
        rng: Draws the samples.
        statistic: `numpy.mean`, `numpy.median` or another function with an `axis`; its name is the key of its value.
        num_samples: Samples with replacement.

    Returns:
        The statistic by its name, `low`, `high` and `n`.

    Raises:
        ValueError: If there are no values.
    """
    values = np.asarray(values)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"`values` must be (n,) with n at least 1, got {values.shape}.")
    samples = statistic(values[rng.integers(len(values), size=(num_samples, len(values)))], axis=1)
    low, high = np.quantile(samples, [0.025, 0.975])
    return {statistic.__name__: float(statistic(values)), "low": float(low), "high": float(high), "n": len(values)}
