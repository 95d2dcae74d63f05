"""The Muon optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..devices import fast_dtype

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial in `orthogonalize`."""


class Muon(torch.optim.Optimizer):
    """The Muon optimizer (https://kellerjordan.github.io/posts/muon/), with the learning rate of AdamW.

    It makes the same steps as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, and can load its state dict.
    `torch.optim.Muon` orthogonalizes updates in bfloat16, which takes several times as long as the rest of a training step on a
    CPU that emulates bfloat16. This class uses float32 on such a device.

    Args:
        params: Matrices to optimize.
        lr: Learning rate, as for AdamW; the updates are scaled to the magnitude of those of AdamW.
        weight_decay: Decoupled weight decay.
        momentum: Nesterov momentum.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; return the loss that `closure` recomputes, or None without a closure."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp(buffer, group["momentum"]).to(fast_dtype(gradient.device)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of a matrix (m, n) with values close to 1."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    factor = matrix.T if is_tall else matrix
    factor = factor / factor.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = factor @ factor.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor = torch.addmm(factor, polynomial, factor, beta=a)
    return factor.T if is_tall else factor
