import numpy as np
import pytest
import scipy.linalg

from irasim_diffusers.metrics import fid, frechet_distance, fvd


def features_of(mean, covariance, count=50, seed=0):
    """Draw samples with exactly this mean and covariance (ddof 1)."""
    samples = np.random.default_rng(seed).normal(size=(count, len(mean)))
    samples -= samples.mean(axis=0)
    whitened = samples @ np.linalg.inv(np.linalg.cholesky(np.cov(samples, rowvar=False))).T
    return whitened @ scipy.linalg.sqrtm(covariance).real + mean


def by_square_root(first, second, ddof):
    """Compute the Frechet distance with a matrix square root, as pytorch-fid and StyleGAN-V do."""
    one, other = (np.cov(features, rowvar=False, ddof=ddof) for features in (first, second))
    root = scipy.linalg.sqrtm(one @ other).real
    return np.square(first.mean(0) - second.mean(0)).sum() + np.trace(one + other - 2 * root)


def test_closed_form_for_commuting_covariances():
    one, other = np.diag([1.0, 4.0, 0.25]), np.diag([9.0, 1.0, 0.25])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    first = features_of(np.array([1.0, 0, 2]), turn @ one @ turn.T)
    second = features_of(np.array([0.0, 0, 0]), turn @ other @ turn.T, count=70, seed=1)
    expected = 5 + (1 - 3) ** 2 + (2 - 1) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_distance_to_itself_and_to_shift():
    features = np.random.default_rng(0).normal(size=(7, 11))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(features, features + 2) == pytest.approx(4 * 11)


@pytest.mark.parametrize(("metric", "ddof"), [(fid, 1), (fvd, 0)])
@pytest.mark.parametrize("counts", [(40, 60), (60, 12)])
def test_matches_reference_formula(metric, ddof, counts):
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(count, 9)) @ rng.normal(size=(9, 9)) for count in counts)
    assert metric(first, second) == pytest.approx(by_square_root(first, second, ddof), rel=1e-8)


def test_few_samples_in_many_dimensions_are_exact():
    """Both sets are in a plane of a 200-dimensional space; the reference uses 2x2 covariances."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 2)), rng.normal(size=(4, 2)) * 3
    plane = np.linalg.qr(rng.normal(size=(200, 2)))[0].T
    expected = by_square_root(first, second, 1)
    assert frechet_distance(first @ plane, second @ plane) == pytest.approx(expected, rel=1e-10)


def test_singular_covariances():
    """For points on two orthogonal lines, the square root of the product is zero."""
    points = np.linspace(-1, 1, 20)[:, None]
    one, other = points * [1.0, 0, 0], points * [0, 2.0, 0]
    assert frechet_distance(one, other) == pytest.approx(points.var(ddof=1) * 5)
    assert frechet_distance(one, one * 0) == pytest.approx(points.var(ddof=1))


def test_single_precision_input():
    features = (1e4 + np.random.default_rng(0).normal(size=(30, 4))).astype(np.float32)
    other = (1e4 + np.random.default_rng(1).normal(size=(30, 4))).astype(np.float32)
    exact = by_square_root(features.astype(np.float64), other.astype(np.float64), 1)
    assert frechet_distance(features, other) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), r"must be \(N, D\) and \(M, D\), got \(3, 4\) and \(3, 5\)"),
        (np.zeros(3), np.zeros(3), r"got \(3,\)"),
        (np.zeros((1, 4)), np.zeros((3, 4)), "must have at least 2 samples each, got 1 and 3"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), "must be finite"),
    ],
)
def test_invalid_features_raise(first, second, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)
