"""Optimizers and learning rate schedules."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from .arguments import RunArguments
from .muon import Muon


def build_optimizers(model: nn.Module, arguments: RunArguments) -> list[torch.optim.Optimizer]:
    """Build AdamW for all trained parameters, or Muon for the blocks' matrices and AdamW for the rest.

    The optimizer `adamw8bit` is AdamW with 8-bit moments.

    Raises:
        ValueError: If the optimizer is Muon and no trained matrix is in a transformer block, or if a hyperparameter of AdamW is invalid.
    """
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
    if arguments.optimizer == "muon" and not matrices:
        raise ValueError("`optimizer` muon requires trained matrices in transformer blocks: use adamw.")
    if matrices:  # both optimizers use the same learning rate
        optimizers.append(Muon(list(matrices.values()), **settings))
    return optimizers


def build_schedules(
    optimizers: list[torch.optim.Optimizer], arguments: RunArguments, accelerator: Accelerator
) -> list[Any]:
    """Build the learning rate schedule of each optimizer.

    Accelerate advances a prepared schedule once per process, so the numbers of steps are multiplied by the number of processes.
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
