"""Loaders of the pretrained networks of LPIPS, FID and FVD. The package contains no weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download

from ..version import INSTALL

EXTRA = f"{INSTALL.format('backbones')}, with a torchvision version that matches torch"


def find_weights(name: str, argument: str) -> Path:
    """Find a weights file locally or on the Hub.

    Args:
        name: Path of a file, or `org/name:file` on the Hub.
        argument: Argument name in error messages.

    Raises:
        ValueError: If the file does not exist or cannot be downloaded.
    """
    if Path(name).is_file():
        return Path(name)
    repository, separator, file = name.partition(":")
    if not separator or repository.count("/") != 1:
        raise ValueError(f"`{argument}` must be a file, or org/name:file on the Hub, got {name!r}.")
    try:
        return Path(hf_hub_download(repository, file))
    except OSError as error:
        raise ValueError(f"`{argument}` {name!r} cannot be downloaded from the Hub: pass a file ({error})") from error


def load_lpips(backbone: str | None = None, device: str | torch.device = "cpu") -> torch.nn.Module:
    """Load LPIPS (AlexNet, version 0.1) from the `lpips` package.

    Args:
        backbone: Torchvision's weights of AlexNet (`alexnet-owt-7be5be79.pth`): a file or `org/name:file`; None to download
            them with torchvision.
        device: Device of the network.

    Raises:
        ValueError: If the package or the weights are missing, or the weights are damaged or do not match the network.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision is built for another torch
        raise ValueError(f"LPIPS requires the package lpips: {EXTRA} ({error}).") from error
    if backbone is None:
        try:
            return lpips.LPIPS(net="alex", verbose=False).to(device)
        except OSError as error:
            raise ValueError(
                f"the weights of AlexNet cannot be downloaded ({error}): pass the file alexnet-owt-7be5be79.pth as `backbone` "
                "(--lpips)."
            ) from error
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # torchvision's names to those of the package, for example 3.weight to slice2.3.weight
    layers = {name.split(".", 1)[1]: name for name in network.net.state_dict()}
    state = _load_state(find_weights(backbone, "lpips"), "lpips")
    features = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    _load_strictly(network.net, {layers.get(name, name): value for name, value in features.items()}, "lpips")
    return network.to(device)


def load_inception(weights: str, device: str | torch.device = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """Load the Inception feature extractor of pytorch-fid.

    Args:
        weights: `pt_inception-2015-12-05-6726825d.pth` from pytorch-fid's releases: a file or `org/name:file`.
        device: Device of the network.

    Returns:
        A function from frames (T, H, W, 3), uint8, to features (T, 2048).

    Raises:
        ValueError: If the package or the weights are missing, or the weights are damaged or do not match the network.
    """
    path = find_weights(weights, "inception")
    try:
        from pytorch_fid import inception as parts
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"FID requires the package pytorch-fid: {EXTRA} ({error}).") from error
    network = parts._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    replaced = {  # TensorFlow's pooling, as in `fid_inception_v3`, which would download weights
        "Mixed_5b": parts.FIDInceptionA(192, pool_features=32),
        "Mixed_5c": parts.FIDInceptionA(256, pool_features=64),
        "Mixed_5d": parts.FIDInceptionA(288, pool_features=64),
        "Mixed_6b": parts.FIDInceptionC(768, channels_7x7=128),
        "Mixed_6c": parts.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6d": parts.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6e": parts.FIDInceptionC(768, channels_7x7=192),
        "Mixed_7b": parts.FIDInceptionE_1(1280),
        "Mixed_7c": parts.FIDInceptionE_2(2048),
    }
    for name, block in replaced.items():
        setattr(network, name, block)
    _load_strictly(network, _load_state(path, "inception"), "inception")
    network.fc, network.transform_input = torch.nn.Identity(), False
    network.eval().to(device)

    @torch.no_grad()
    def features(frames: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, 1))).to(device).float() / 255
        pixels = torch.nn.functional.interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False)
        return network(2 * pixels - 1).cpu().numpy()

    return features


def load_i3d(path: str, device: str | torch.device = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """Load the I3D feature extractor of StyleGAN-V, `i3d_torchscript.pt`.

    A TorchScript file is a program, and loading it runs its code. It is therefore never downloaded. Use a file from a source
    that you trust.

    Args:
        path: Path of the TorchScript file.
        device: Device of the network.

    Returns:
        A function from a video (T, H, W, 3), uint8, to features (400,).

    Raises:
        ValueError: If the file does not exist or is not a TorchScript file.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"`i3d` must be a TorchScript file such as i3d_torchscript.pt, got {str(path)!r}, which is not a file."
        )
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"`i3d` must be a TorchScript file, got {str(path)!r}: {str(error).splitlines()[0]}"
        ) from error

    @torch.no_grad()
    def features(video: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(video, -1, 0)))[None].to(device)  # (1, 3, T, H, W)
        return network(pixels, rescale=True, resize=True, return_features=True)[0].cpu().numpy()

    return features


def _load_state(path: Path, argument: str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives, and pickles that `weights_only` rejects, raise errors of many types
        raise ValueError(f"`{argument}` must be a file with weights, got {str(path)!r}: {error!s:.300}") from error


def _load_strictly(network: torch.nn.Module, state: dict[str, Any], argument: str) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"`{argument}` must contain the weights of this network: {error!s:.300}") from error
