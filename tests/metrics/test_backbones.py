import sys

import numpy as np
import pytest
import torch

from irasim_diffusers.metrics import load_i3d, load_inception, load_lpips


class Detector(torch.nn.Module):
    """Network with the signature of StyleGAN-V's I3D: videos (B, 3, T, H, W), uint8, to (B, F)."""

    def forward(self, videos: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert rescale
        assert resize
        assert return_features
        return videos.float().mean(dim=(3, 4)).flatten(1)


def test_i3d_from_torchscript_file(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Detector()).save(str(path))
    video = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    assert np.allclose(load_i3d(str(path))(video), video.mean(axis=(1, 2)).T.ravel(), rtol=1e-5)


def test_i3d_is_not_downloaded(tmp_path):
    with pytest.raises(
        ValueError, match=r"`i3d` must be a TorchScript file such as i3d_torchscript.pt, got 'org/name:i3d.pt'"
    ):
        load_i3d("org/name:i3d.pt")
    (tmp_path / "text.pt").write_text("no script")
    with pytest.raises(ValueError, match=r"`i3d` must be a TorchScript file, got .*text.pt"):
        load_i3d(str(tmp_path / "text.pt"))


@pytest.mark.parametrize(
    ("load", "package", "message"),
    [
        (load_lpips, "lpips", r"LPIPS requires the package lpips: pip install '.\[backbones\]' in a clone"),
        (
            load_inception,
            "pytorch_fid",
            r"FID requires the package pytorch-fid: pip install '.\[backbones\]' in a clone",
        ),
    ],
)
def test_missing_package_raises(monkeypatch, tmp_path, load, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "weights.pth"))


def backbones():
    """Return pytorch-fid's module; skip the test without the extra and a matching torchvision."""
    pytest.importorskip("lpips", exc_type=(ImportError, RuntimeError))
    return pytest.importorskip("pytorch_fid.inception", exc_type=(ImportError, RuntimeError))


def test_lpips_with_alexnet_from_file(tmp_path):
    backbones()
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), tmp_path / "alexnet.pth")
    network = load_lpips(str(tmp_path / "alexnet.pth"))
    one, other = torch.rand(2, 3, 3, 64, 72) * 2 - 1
    assert network(one, one).abs().max() < 1e-6
    assert network(one, other).shape == (3, 1, 1, 1)
    again = load_lpips(str(tmp_path / "alexnet.pth"))
    torch.testing.assert_close(network(one, other), again(one, other))  # no weight is random


def test_inception_matches_pytorch_fid(tmp_path, monkeypatch):
    inception = backbones()
    from torchvision.models import inception_v3

    state = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    torch.save(state, tmp_path / "inception.pth")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)  # instead of a download
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = inception.InceptionV3().eval()(pixels)[0].flatten(1)
    np.testing.assert_allclose(load_inception(str(tmp_path / "inception.pth"))(frames), expected, rtol=1e-4, atol=1e-6)
    (tmp_path / "other.pth").write_bytes(b"no weights")
    for name, message in (
        ("other.pth", "must be a file with weights"),
        ("none.pth", "must be a file, or org/name:file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_inception(str(tmp_path / name))


@pytest.mark.hub
def test_lpips_downloads_alexnet():
    backbones()
    try:
        network = load_lpips()
    except ValueError as error:
        pytest.skip(str(error))
    black, white = -torch.ones(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    assert network(black, white).item() > 0.1
