"""Statistics of LeRobot datasets, as LeRobot computes them.

Means and standard deviations are computed in float64. LeRobot computes them in float32, which loses digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
HISTOGRAM_BINS = 5000
LARGE_PICTURE = 300  # side length from which LeRobot subsamples images
SUBSAMPLED_SIDE = 150


def vector_statistics(values: np.ndarray) -> dict[str, list]:
    """Statistics over the rows of one episode's vectors (T, D)."""
    values = values.astype(np.result_type(values.dtype, np.float32))
    ones = np.ones(len(values))
    return {"count": [len(values)]} | _transpose([_statistics(column, ones) for column in values.T])


def image_statistics(frames: np.ndarray) -> dict[str, list]:
    """Statistics of an episode's frames (T, H, W, 3), uint8, scaled to [0, 1].

    They are computed from evenly spaced frames, and from a part of the pixels of large frames. Except for `count`, the number of
    these frames, the statistics are nested lists of shape (3, 1, 1).
    """
    length = len(frames)
    samples = max(min(100, length), min(int(length**0.75), 10_000))
    frames = frames[np.linspace(0, length - 1, samples).round().astype(int)]
    height, width = frames.shape[1:3]
    if max(height, width) >= LARGE_PICTURE:
        step = (width if width > height else height) // SUBSAMPLED_SIDE
        frames = frames[:, ::step, ::step]
    channels = []
    for channel in range(3):
        counts = np.bincount(frames[..., channel].ravel(), minlength=256)
        (levels,) = np.nonzero(counts)
        channels.append(_statistics(levels.astype(np.float32), counts[levels]))
    scaled = {name: [[[value / 255]] for value in values] for name, values in _transpose(channels).items()}
    return {"count": [samples]} | scaled


def pool(parts: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Pool the statistics of several episodes.

    Quantiles are averaged with weights proportional to the number of samples, as in LeRobot.
    """
    counts = np.array([part["count"][0] for part in parts], dtype=np.float64)
    weights = counts / counts.sum()

    def average(values: np.ndarray) -> np.ndarray:
        return np.tensordot(weights, values, axes=1)

    stacked = {name: np.stack([np.array(part[name]) for part in parts]) for name in parts[0] if name != "count"}
    mean = average(stacked["mean"])
    variance = average(stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)
    pooled = {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "mean": mean, "std": np.sqrt(variance)}
    pooled |= {name: average(stacked[name]) for name in QUANTILES}
    return {name: value.tolist() for name, value in pooled.items()} | {"count": [int(counts.sum())]}


def _transpose(columns: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [column[name] for column in columns] for name in columns[0]}


def _statistics(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Statistics of values (N,), each of which occurs `counts` times."""
    exact, total = values.astype(np.float64), counts.sum()
    mean = float(exact @ counts / total)
    deviation = float(np.sqrt((exact - mean) ** 2 @ counts / total))
    bounds = {"min": float(exact.min()), "max": float(exact.max())}
    return bounds | {"mean": mean, "std": deviation} | _quantiles(values, counts, mean)


def _quantiles(values: np.ndarray, counts: np.ndarray, mean: float) -> dict[str, float]:
    """Quantiles read from a histogram, as LeRobot estimates them.

    The mean is returned for a single value, or if it is not finite.
    """
    total = counts.sum()
    if total < 2 or not np.isfinite(mean):
        return dict.fromkeys(QUANTILES, mean)
    # the edges have the precision of the values, as in LeRobot
    edges = np.linspace(values.min() - 1e-10, values.max() + 1e-10, HISTOGRAM_BINS + 1)
    below = np.concatenate([[0], np.histogram(values, edges, weights=counts)[0].cumsum()])
    quantiles = {}
    for name, level in QUANTILES.items():
        place = int(np.searchsorted(below[1:], level * total))  # the bin that contains the quantile
        fraction = (level * total - below[place]) / (below[place + 1] - below[place]) if place else 0.0
        quantiles[name] = float(edges[place] + fraction * (edges[place + 1] - edges[place]))
    return quantiles
