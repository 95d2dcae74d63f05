import numpy as np
import pytest

from irasim_diffusers.metrics import bootstrap


def test_interval_matches_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, size=1000)
    found = bootstrap(values, np.random.default_rng(1))
    error = 1.96 * values.std() / np.sqrt(1000)
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["high"] - found["low"]) / 2 == pytest.approx(error, rel=0.1)
    assert found["n"] == 1000


def test_median_and_single_value():
    found = bootstrap(np.array([1.0, 2.0, 30.0]), np.random.default_rng(0), np.median)
    assert (found["median"], found["low"], found["high"]) == (2, 1, 30)
    assert bootstrap(np.array([5.0]), np.random.default_rng(0)) == {"mean": 5, "low": 5, "high": 5, "n": 1}


def test_interval_is_percentile_bootstrap():
    values, samples = np.random.default_rng(2).normal(size=37), 2000
    found = bootstrap(values, np.random.default_rng(3), num_samples=samples)
    means = values[np.random.default_rng(3).integers(37, size=(samples, 37))].mean(axis=1)
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 3))])
def test_invalid_values_raise(values):
    with pytest.raises(ValueError, match=r"`values` must be \(n,\)"):
        bootstrap(values, np.random.default_rng(0))
