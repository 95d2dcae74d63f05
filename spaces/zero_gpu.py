"""Support for ZeroGPU, which runs a call in another process with a GPU; elsewhere, in this process."""

from __future__ import annotations

import os
from typing import Any

import torch

from irasim_diffusers import IRASimPipeline, RolloutState

try:
    from spaces import GPU  # type: ignore[attr-defined]  # must be imported before CUDA is initialized
except ImportError:

    def GPU(function: Any) -> Any:
        """Return the function unchanged."""
        return function


ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
COMPUTING = (
    "__call__",
    "encode_history",
    "decode_latents",
    "start",
    "advance",
    "decode",
)
_PIPELINES: dict[str, IRASimPipeline] = {}  # of this process; forked processes inherit them


class LentPipeline:
    """Pipeline whose computing methods run, with ZeroGPU, in the process with the GPU.

    There, arguments and results are copied.
    """

    def __init__(self, name: str, pipeline: IRASimPipeline) -> None:
        _PIPELINES[name] = pipeline
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in COMPUTING:
            return getattr(_PIPELINES[self._name], attribute)
        return lambda *arguments, **named: _compute(self._name, attribute, arguments, named)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the pipeline."""
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
    """Move tensors and rollout states, also in a tuple, to a device; return other values unchanged."""
    if type(value) is tuple:
        return tuple(_move(each, device) for each in value)
    return value.to(device) if isinstance(value, (torch.Tensor, RolloutState)) else value
