"""Where and in which type a model runs fastest on this machine."""

from collections.abc import Mapping
from typing import Any

import torch


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, float32 where that is emulated: half as fast on a CPU without AVX-512 BF16."""
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities: Mapping[str, Any] = getattr(
            torch.cpu, "get_capabilities", dict
        )()  # an older torch does not tell
        native = any(has and name.endswith("bf16") for name, has in capabilities.items())
    else:
        native = True
    return torch.bfloat16 if native else torch.float32
