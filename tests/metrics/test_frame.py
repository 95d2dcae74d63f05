import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from irasim_diffusers.metrics import psnr


def test_psnr_equals_scikit_image_on_whole_clips():
    rng = np.random.default_rng(0)
    truth, prediction = rng.random((2, 3, 4, 5, 6, 3))
    clips = zip(truth, prediction, strict=True)
    expected = [peak_signal_noise_ratio(one, other, data_range=1) for one, other in clips]
    assert psnr(prediction, truth).shape == (3,)
    assert np.allclose(psnr(prediction, truth), expected)


def test_static_frames_do_not_blow_it_up():
    truth = np.zeros((4, 5, 6, 3))
    prediction = truth.copy()
    prediction[0] += 0.1
    assert psnr(prediction, truth) == pytest.approx(20 + 10 * np.log10(4))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 2, 3\) and \(2, 2, 2, 3\)"):
        psnr(np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 2, 3)))
