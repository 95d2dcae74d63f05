import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from irasim_diffusers.metrics import frame_lpips, frame_psnr, frame_ssim, gray, latent_l2, psnr


@pytest.fixture
def clips():
    """Two clips of three frames, truth and prediction, in [0, 1]."""
    return np.random.default_rng(0).random((2, 2, 3, 9, 11, 3))


def test_psnr_of_clips_matches_scikit_image(clips):
    truth, prediction = clips
    expected = [
        peak_signal_noise_ratio(one, other, data_range=1) for one, other in zip(truth, prediction, strict=True)
    ]
    assert psnr(prediction, truth).shape == (2,)
    assert np.allclose(psnr(prediction, truth), expected, rtol=1e-12)


def test_static_frames_do_not_dominate():
    truth = np.zeros((4, 5, 6, 3))
    prediction = truth.copy()
    prediction[0] += 0.1
    assert psnr(prediction, truth) == pytest.approx(20 + 10 * np.log10(4))


def test_frame_metrics_match_scikit_image(clips):
    """The metrics are computed from 8-bit frames, as in the paper."""
    truth, prediction = np.rint(clips * 255).astype(np.uint8)
    pairs = list(zip(truth.reshape(-1, 9, 11, 3), prediction.reshape(-1, 9, 11, 3), strict=True))
    expected = np.reshape([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs], (2, 3))
    assert np.allclose(frame_psnr(prediction / 255, truth / 255), expected, rtol=1e-12)
    expected = np.reshape([structural_similarity(*pair, channel_axis=-1) for pair in pairs], (2, 3))
    assert np.allclose(frame_ssim(prediction / 255, truth / 255), expected, rtol=1e-9)


def test_gray_matches_opencv(clips):
    frames = np.rint(clips[0] * 255).astype(np.uint8)
    expected = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames.reshape(-1, 9, 11, 3)])
    image = gray(frames)
    assert image.shape == (2, 3, 9, 11, 1)
    assert abs(image.reshape(expected.shape).astype(int) - expected).max() <= 1  # OpenCV uses fixed-point arithmetic
    other = cv2.GaussianBlur(expected[0], (3, 3), 0)
    value = frame_ssim(image[0, 0] / 255, other[..., None] / 255)
    assert value == pytest.approx(structural_similarity(image[0, 0, ..., 0], other), rel=1e-9)


def test_latent_l2_is_mean_squared_error_per_clip():
    prediction, truth = torch.randn(2, 3, 4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    expected = [torch.nn.functional.mse_loss(*pair).item() for pair in zip(prediction, truth, strict=True)]
    assert np.allclose(latent_l2(prediction, truth), expected, rtol=1e-5)


def test_lpips_receives_frames_in_its_range(clips):
    def network(prediction, truth):  # (N, 3, H, W), in [-1, 1]
        assert prediction.shape == (3, 3, 9, 11)
        return (prediction - truth).abs().amax(dim=(1, 2, 3), keepdim=True)

    truth, prediction = clips[:, 0]
    expected = 2 * abs(prediction - truth).max(axis=(1, 2, 3))
    assert np.allclose(frame_lpips(network, prediction, truth), expected, rtol=1e-5)


@pytest.mark.parametrize("metric", [psnr, frame_psnr, frame_ssim])
def test_different_shapes_raise(metric):
    with pytest.raises(ValueError, match=r"the same shape, got \(1, 2, 2, 3\) and \(2, 2, 2, 3\)"):
        metric(np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 2, 3)))
