"""Select the default device and the fastest dtype."""

from collections.abc import Mapping
from typing import Any

import torch


def default_device() -> str:
    """Return "cuda" if a CUDA device is available, "cpu" otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """Return bfloat16 if the device supports it in hardware, float32 otherwise.

    A CPU without AVX-512 BF16 or AMX emulates bfloat16, and is then much slower than in float32. Device types other than CUDA
    and CPU are not checked; bfloat16 is returned for them.
    """
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # older versions of torch do not have `get_capabilities`
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(has and name.endswith("bf16") for name, has in capabilities.items())
    else:
        native = True
    return torch.bfloat16 if native else torch.float32
