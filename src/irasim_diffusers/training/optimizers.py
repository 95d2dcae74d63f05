"""Optimizers and learning rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from ..devices import fast_dtype
from .arguments import RunArguments


class Muon(torch.optim.Muon):
    """Muon with Newton-Schulz iterations in float32 on devices that emulate bfloat16.

    PyTorch always iterates in bfloat16, which takes several times as long as the rest of a training step on such a CPU. The
    learning rate is adjusted with `match_rms_adamw`.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters."""
        if fast_dtype(self.param_groups[0]["params"][0].device) == torch.bfloat16:
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"])  # Nesterov momentum
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = 0.2 * group["lr"] * max(parameter.shape) ** 0.5
        parameter.add_(orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"]), alpha=-rate)


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """Compute the approximate polar factor of a matrix, like `torch.optim.Muon` but in the dtype of the matrix.

    Reference: https://kellerjordan.github.io/posts/muon/.

    Args:
        matrix: The matrix (m, n).
        coefficients: Coefficients of the quintic polynomial.
        num_steps: Number of Newton-Schulz iterations.
        eps: Lower bound of the norm.

    Returns:
        A matrix (m, n) with singular values close to 1.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    factor = matrix.T if is_tall else matrix
    factor = factor / factor.norm().clamp_min(eps)
    for _ in range(num_steps):
        gram = factor @ factor.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor = torch.addmm(factor, polynomial, factor, beta=a)
    return factor.T if is_tall else factor


def build_optimizers(model: nn.Module, arguments: RunArguments) -> list[torch.optim.Optimizer]:
    """Build AdamW for all trained parameters, or Muon for the blocks' matrices and AdamW for the rest."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {
        name: parameter
        for name, parameter in named.items()
        if arguments.optimizer == "muon" and parameter.ndim == 2 and "transformer_blocks." in name
    }
    settings: dict[str, Any] = {"lr": arguments.learning_rate, "weight_decay": arguments.adam_weight_decay}
    adam: dict[str, Any] = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    if arguments.optimizer == "adamw8bit":
        import bitsandbytes

        return [bitsandbytes.optim.AdamW8bit(rest, **adam, **settings)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, fused=True, **adam, **settings)]
    if matrices:  # both optimizers use the same learning rate
        optimizers.append(Muon(list(matrices.values()), **settings))
    return optimizers


def build_schedules(
    optimizers: list[torch.optim.Optimizer], arguments: RunArguments, accelerator: Accelerator
) -> list[Any]:
    """Build the learning rate schedule of each optimizer.

    Accelerate advances a prepared schedule once per process, so that steps are multiplied by their number.
    """
    return [
        get_scheduler(
            arguments.lr_scheduler,
            optimizer,
            num_warmup_steps=arguments.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=arguments.max_train_steps * accelerator.num_processes,
            num_cycles=arguments.lr_num_cycles,
            power=arguments.lr_power,
        )
        for optimizer in optimizers
    ]
