"""ZeroGPU, where a GPU is lent for the time of a call, to another process; elsewhere nothing of this is in use."""

from __future__ import annotations

import os
from typing import Any

import torch

from irasim_diffusers import IRASimPipeline, RolloutState

try:
    from spaces import GPU  # type: ignore[attr-defined]  # must come before CUDA is touched
except ImportError:

    def GPU(function: Any) -> Any:
        """No GPU is lent here."""
        return function


ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
COMPUTING = (
    "__call__",
    "predict",
    "encode_history",
    "predict_latents",
    "decode_latents",
    "start",
    "advance",
    "decode",
)
_PIPELINES: dict[str, IRASimPipeline] = {}  # of this process, and of the ones forked from it


class LentPipeline:
    """A pipeline whose computing methods run where the GPU is lent; what they take and give is copied there and back."""

    def __init__(self, name: str, pipeline: IRASimPipeline) -> None:
        _PIPELINES[name] = pipeline
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in COMPUTING:
            return getattr(_PIPELINES[self._name], attribute)
        return lambda *arguments, **named: _compute(self._name, attribute, arguments, named)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """As the pipeline's own."""
        return _compute(self._name, "__call__", arguments, named)


@GPU
@torch.no_grad()
def _compute(name: str, method: str, arguments: tuple, named: dict[str, Any]) -> Any:
    pipeline = _PIPELINES[name]
    there = pipeline._execution_device
    moved = [_move(each, there) for each in arguments]
    named = {name: _move(each, there) for name, each in named.items()}
    return _move(getattr(pipeline, method)(*moved, **named), "cpu")


def _move(value: Any, device: torch.device | str) -> Any:
    """Tensors and rollout states on a device, also in a plain tuple; other values as they are."""
    if type(value) is tuple:
        return tuple(_move(each, device) for each in value)
    return value.to(device) if isinstance(value, (torch.Tensor, RolloutState)) else value
