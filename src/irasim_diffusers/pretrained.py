"""Load world models with the models and start frames stored with them; import user-defined callables."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .devices import default_device, fast_dtype
from .json_files import read_config
from .models import ProprioceptionModel
from .pipelines import IRASimPipeline
from .rewards import FrameRegressor


def load_world_model(model: Any, device: Any = None) -> dict[str, Any]:
    """Load a pipeline with its stored proprioception model, reward and start frames, as keyword arguments.

    Args:
        model: Folder or Hub id of a pipeline. A world model is returned as `model`, without other entries.
        device: Device of a loaded pipeline; None for CUDA if available, else the CPU.

    Returns:
        `model` and, if stored with it, `proprioception` (folder `proprioception/`), `reward` (a `FrameRegressor` in `reward/`),
        `success` (if this regressor has a `success_threshold`), and `starts` (`starts.png`, one column of frames).

    Raises:
        ValueError: If the pipeline or a stored model is invalid, or the start frames cannot be read.
        OSError: If the pipeline is not found, or a file of a stored model is missing.
    """
    if not isinstance(model, str | Path):
        return {"model": model}
    device = default_device() if device is None else device
    pipe = IRASimPipeline.from_pretrained(model, dtype=fast_dtype(device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    loaded: dict[str, Any] = {"model": pipe}
    if path := _stored_file(model, "proprioception/config.json"):
        read_config(Path(path))
        loaded["proprioception"] = _load_proprioception(model).to(device)
    if path := _stored_file(model, "reward/config.json"):
        read_config(Path(path))
        loaded["reward"] = reward = FrameRegressor.from_pretrained(model, subfolder="reward").to(device).eval()
        if reward.config.success_threshold is not None:
            loaded["success"] = reward.success
    if path := _stored_file(model, "starts.png"):
        loaded["starts"] = _read_starts(path, pipe.frame_size)
    return loaded


def _load_proprioception(model: str | Path) -> ProprioceptionModel:
    loaded = ProprioceptionModel.from_pretrained(model, subfolder="proprioception")
    scale = np.asarray(loaded.config.state_scale, dtype=np.float64)
    if not (np.isfinite(scale) & (scale != 0)).all():
        raise ValueError(
            f"`state_scale` of the proprioception model must be finite and not zero, got {scale.tolist()}."
        )
    return loaded


def _read_starts(path: str, size: tuple[int, int]) -> np.ndarray:
    """Read start frames (N, H, W, 3) from an image that contains them in one column."""
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            if width != size[1] or height % size[0]:
                raise ValueError(
                    f"the image must be one column of frames of {size[1]}x{size[0]} pixels, got {width}x{height}"
                )
            return np.asarray(image.convert("RGB")).reshape(-1, *size, 3)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"the start frames {path!r} cannot be read: {error}.") from error


def _stored_file(model: str | Path, name: str) -> str | None:
    """Return a file's path in a folder or Hub repository, downloaded if needed; None if it is absent."""
    if Path(model).is_dir():
        return str(Path(model) / name) if (Path(model) / name).is_file() else None
    try:
        return hf_hub_download(str(model), name)
    except EntryNotFoundError:  # also in offline mode, if the file is not in the cache
        return None


def import_callable(argument: str, path: str) -> Callable[..., Any]:
    """Import a user-defined callable; its module may be in the current working directory.

    Args:
        argument: Argument or flag to name in errors.
        path: `module:name`; the name may be dotted.

    Raises:
        ValueError: If the module cannot be imported, or the name does not exist or is not a callable.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # the module may raise errors of any type
        raise ValueError(f"{argument} must be MODULE:NAME of a callable, got {path!r}: {error}.") from error
    if not callable(found):
        raise ValueError(
            f"{argument} must be MODULE:NAME of a callable, got {path!r}, a value of type {type(found).__name__}."
        )
    return found
