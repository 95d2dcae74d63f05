"""Optimizers and learning rate schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from ..devices import fast_dtype
from .arguments import RunArguments

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration of Muon."""


class Muon(torch.optim.Optimizer):
    """The Muon optimizer (https://kellerjordan.github.io/posts/muon/), with the learning rate of AdamW.

    It makes the steps of `torch.optim.Muon` with `match_rms_adamw`, and has the same state dict. That one orthogonalizes updates in
    bfloat16, which takes several times as long as the rest of a training step on a CPU that emulates bfloat16. This one uses
    float32 on such a device.

    Args:
        params: Matrices.
        lr: Learning rate of AdamW; the updates are scaled to its magnitude.
        weight_decay: Decoupled weight decay.
        momentum: Nesterov momentum.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; `closure` computes the loss again."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp(buffer, group["momentum"]).to(fast_dtype(gradient.device)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of a matrix (m, n) by values close to 1, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    factor = matrix.T if is_tall else matrix
    factor = factor / factor.norm().clamp_min(1e-7)
    for _ in range(5):
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
