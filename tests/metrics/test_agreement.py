import numpy as np
import pytest
from scipy import stats

from irasim_diffusers.metrics import agreement, mmrv, pearson, spearman

REAL, MODEL = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.1, 0.95])


def test_mmrv_of_a_known_case():
    assert mmrv(REAL, MODEL) == pytest.approx((0.4 + 0.4 + 0) / 3)  # only the first two policies are exchanged
    assert mmrv(REAL, 0.3 * REAL + 0.1) == 0
    assert mmrv(REAL, -REAL) == pytest.approx((0.8 + 0.4 + 0.8) / 3)
    assert mmrv([0.2, 0.7], [0.5, 0.5]) == pytest.approx(0.25)  # a tie in the model violates one of the two orders


def test_correlations_equal_scipy():
    assert pearson(REAL, MODEL) == pytest.approx(stats.pearsonr(REAL, MODEL).statistic)
    assert spearman(REAL, MODEL) == pytest.approx(0.5)
    assert np.isnan(pearson([1, 1, 1], MODEL))
    for scale in (1e-200, 1e300):
        assert pearson(scale * REAL, MODEL) == pytest.approx(pearson(REAL, MODEL))
    assert np.isnan(spearman(REAL, [0, 0, 0]))


def test_intervals_shrink_with_more_seeds():
    rng = np.random.default_rng(0)
    rates = np.linspace(0.1, 0.9, 5)[:, None]
    widths = []
    for seeds in (20, 500):
        real, model = rng.random((2, 5, seeds)) < rates
        found = agreement(real, model, rng, num_samples=300)
        assert found["pearson"]["low"] <= found["pearson"]["value"] <= found["pearson"]["high"]
        fisher = stats.pearsonr(real.mean(1), model.mean(1)).confidence_interval()
        assert (found["pearson"]["fisher_low"], found["pearson"]["fisher_high"]) == pytest.approx(fisher)
        assert found["mmrv"]["n"] == 5
        widths.append(found["pearson"]["high"] - found["pearson"]["low"])
    assert widths[1] < 0.5 * widths[0]


def test_equal_scores_have_no_correlation():
    found = agreement(np.ones((3, 4)), np.ones((3, 4)), np.random.default_rng(0), num_samples=20)
    assert found["pearson"] == {"value": None, "low": None, "high": None, "n": 3}
    assert found["mmrv"]["value"] == 0


@pytest.mark.parametrize("shapes", [((1, 4), (1, 4)), ((3, 4), (3, 5)), ((3,), (3,)), ((3, 0), (3, 0))])
def test_wrong_shapes_raise(shapes):
    with pytest.raises(ValueError, match="`real` and `model` must both be"):
        agreement(np.zeros(shapes[0]), np.zeros(shapes[1]), np.random.default_rng(0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_raise(value):
    with pytest.raises(ValueError, match="must be finite"):
        mmrv([0, value, 1], MODEL)
    with pytest.raises(ValueError, match="must be finite"):
        agreement([[0, value], [1, 2]], [[0, 1], [1, 2]], np.random.default_rng(0))


def test_no_samples_raise():
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        agreement(np.zeros((3, 4)), np.zeros((3, 4)), np.random.default_rng(0), num_samples=0)
