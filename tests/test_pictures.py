import numpy as np
import PIL.Image
import pytest
import torch

from irasim_diffusers.pictures import resize, resize_video


@pytest.mark.parametrize("size", [(7, 9), (30, 44), (10, 14), (20, 7)])
def test_resizing_matches_pillow(size):
    """Pillow's bilinear filter, which is antialiased, is the reference."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 14, 3), dtype=np.uint8)
    expected = np.stack(
        [np.asarray(PIL.Image.fromarray(frame).resize(size[::-1], PIL.Image.BILINEAR)) for frame in frames]
    )
    found = resize_video(frames, size)
    assert (found.shape, found.dtype) == ((3, *size, 3), np.uint8)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_any_leading_dimensions_and_types():
    pixels = torch.rand(2, 70, 3, 12, 10, dtype=torch.float64) * 2 - 1
    resized = resize(pixels, (6, 5))
    assert (resized.shape, resized.dtype) == ((2, 70, 3, 6, 5), torch.float64)
    assert torch.equal(resize(pixels[1, 69], (6, 5)), resized[1, 69])
    assert resize(pixels, (12, 10)) is pixels
    levels = resize((pixels * 127 + 128).to(torch.uint8), (6, 5))
    assert levels.dtype == torch.uint8
    assert (levels.double() - (resized * 127 + 128)).abs().max() < 1.6


def test_a_constant_stays_constant_and_gradients_pass():
    pixels = torch.full((2, 3, 9, 9), 0.3, requires_grad=True)
    resized = resize(pixels, (4, 5))
    torch.testing.assert_close(resized, torch.full((2, 3, 4, 5), 0.3))
    resized.sum().backward()
    torch.testing.assert_close(pixels.grad.sum(), torch.tensor(120.0))
