"""The training loop: steps, averaged weights, logging, checkpoints and exact resume."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import MixedClips
from ..data.content_hash import tensors_hash
from ..latents import Autoencoder, scale_latents
from ..models import Denoiser, noise_process, public_config
from .arguments import RunArguments
from .checkpoints import (
    averaged_state,
    list_checkpoints,
    load_average,
    newest_checkpoint,
    save_average,
    save_checkpoint,
    seconds_trained,
    step_of,
    whole,
)
from .launch import default_settings, fixed_settings
from .loss import training_loss
from .objective import StateReadout
from .optimizers import build_optimizers, build_schedules
from .scripts import Interruption, stop_training

logger = get_logger(__name__, log_level="INFO")
UNREADABLE = (
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    AttributeError,
    TypeError,
    UnpicklingError,
    SafetensorError,
)
"""Errors that the loaders raise if the files of a checkpoint are intact but do not belong to this run."""


class TrainingRun:
    """A training run, which continues from its newest checkpoint if there is one.

    Args:
        accelerator: The accelerator.
        arguments: Arguments of the run.
        transformer: The model; parameters that require a gradient are trained and averaged.
        clips: Training clips.
        vae: Autoencoder of the latents; None for pixel space.
        folders: Folders of the cached latents, which identify the data.
        copy: Function that builds a model of the same structure, on the CPU; its weights are replaced.

    Attributes:
        step: Number of completed steps.
        seconds: Training time, including earlier parts of a resumed run.

    Raises:
        ValueError: If the clips do not fill one batch per process, the optimizer does not support the model, or the checkpoints
            are damaged or belong to another run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: RunArguments,
        transformer: Denoiser,
        clips: MixedClips,
        vae: Autoencoder | None,
        folders: list[Path],
        copy: Callable[[], Denoiser],
    ) -> None:
        _check_batch_size(arguments, clips, accelerator)
        self.accelerator, self.arguments, self.vae, self.clips = accelerator, arguments, vae, clips
        self.transformer, self.config, self.copy = transformer, transformer.config, copy
        self.output = Path(arguments.output_dir)
        self.settings = fixed_settings(arguments, accelerator) | {
            "latents": [folder.name for folder in folders],
            "config": public_config(self.config),
            **frozen_weights(transformer),
        }
        _configure(transformer, arguments)
        trained = StateReadout(transformer, clips[0]["states"].shape[1]) if arguments.state_keys else transformer
        optimizers = build_optimizers(trained, arguments)
        schedules = build_schedules(optimizers, arguments, accelerator)
        loader = DataLoader(
            clips,
            batch_size=arguments.train_batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=arguments.dataloader_num_workers,
        )
        self.model, self.loader, *prepared = accelerator.prepare(trained, loader, *optimizers, *schedules)
        self.optimizers, self.schedules = prepared[: len(optimizers)], prepared[len(optimizers) :]
        self.ema = EMAModel(  # after the model has been sharded
            self._trained_parameters(),
            decay=arguments.ema_decay,
            use_ema_warmup=arguments.ema_warmup,
            power=3 / 4,
            foreach=True,
        )
        self.ema.to(accelerator.device, torch.float32)  # float32 also if DeepSpeed has cast the model
        self.noise_scheduler = noise_process(self.config)
        if arguments.report_to:
            flags = {
                name: value if isinstance(value, int | float) else str(value)
                for name, value in vars(arguments).items()
            }
            accelerator.init_trackers("irasim-diffusers", config=flags)
        self.step, self.seconds, self.batch_number = 0, 0.0, 0
        self.losses: dict[str, torch.Tensor] = {}  # means over the batches of a step
        self._resume()
        self.start = time.perf_counter() - self.seconds
        self.bar = tqdm(
            total=arguments.max_train_steps,
            initial=self.step,
            disable=not accelerator.is_main_process,
            unit="step",
        )

    def steps(self) -> Iterator[int]:
        """Train, and yield the number of completed steps after each step and its checkpoint.

        Raises:
            FloatingPointError: If the loss or the gradient is not finite.
            OSError, SafetensorError: If a checkpoint cannot be written.
            SystemExit: After Ctrl-C or SIGTERM, when the checkpoint has been written.
        """
        arguments, accumulation = self.arguments, self.accelerator.gradient_accumulation_steps
        limit = math.inf if arguments.max_train_minutes is None else 60 * arguments.max_train_minutes
        epoch, done = divmod(self.step, -(-len(self.loader) // accumulation))
        self.batch_number = epoch * len(self.loader) + done * accumulation
        with Interruption() as interruption:
            while self.step < arguments.max_train_steps and self.seconds < limit:
                for batch in self._epoch(epoch, done * accumulation):
                    self._train_batch(batch)
                    if not self.accelerator.sync_gradients:
                        continue
                    self._finish_step(limit)
                    stopped_by = interruption.requested(self.accelerator)
                    last = self.step == arguments.max_train_steps or self.seconds >= limit
                    if self.step % arguments.checkpointing_steps == 0 or last or stopped_by:
                        self._save_checkpoint()
                    if stopped_by:
                        stop_training(self.accelerator, stopped_by, self.step)
                    yield self.step
                    if last:
                        break
                epoch, done = epoch + 1, 0

    def averaged(self) -> Any:
        """Return a model with the averaged weights on the CPU, in evaluation mode.

        Every process must call this method.
        """
        model = self.copy()
        model.load_state_dict(averaged_state(self.ema, self.transformer))
        return model.eval()

    def _trained_parameters(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for parameter in self.transformer.parameters() if parameter.requires_grad)

    def _resume(self) -> None:
        newest = newest_checkpoint(self.output, self.settings, default_settings(self.arguments))
        if newest is None:
            return
        self.seconds, self.step = seconds_trained(newest), step_of(newest)
        try:
            self.accelerator.load_state(str(newest))
            load_average(self.ema, self.transformer, newest)
        except torch.OutOfMemoryError:
            raise  # the checkpoint is intact
        except UNREADABLE as error:
            raise ValueError(
                f"{str(newest)!r} cannot be loaded: {type(error).__name__}: {str(error).strip().rstrip('.')}. If it is not a "
                "checkpoint of this run, delete it to resume from an earlier one."
            ) from error
        logger.info(f"resumed from {newest}")

    def _epoch(self, epoch: int, skipped: int) -> Any:
        """Return the batches of an epoch after the first `skipped` ones."""
        self.loader.set_epoch(epoch)
        self.clips.set_epoch(epoch)
        if not skipped:
            return self.loader
        batches = self.accelerator.skip_first_batches(self.loader, skipped)
        batches.iteration = epoch  # accelerate before 1.15 does not set the epoch
        return batches

    def _train_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """Compute the gradient of a batch, and update the weights after the last batch of a step."""
        accelerator = self.accelerator
        place = self.batch_number * accelerator.num_processes + accelerator.process_index
        if self.vae is not None:
            batch = batch | {"latents": scale_latents(self.vae, batch["latents"])}
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                losses = training_loss(
                    self.model,
                    self.noise_scheduler,
                    batch,
                    self.config,
                    self.arguments,
                    step=self.step,
                    position=place * self.arguments.train_batch_size,
                )
            for name, loss in losses.items():
                part = loss.detach() / accelerator.gradient_accumulation_steps
                self.losses[name] = self.losses[name] + part if name in self.losses else part
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
                # a scaler skips steps with a gradient that is not finite
                self._check_finite(norm if accelerator.scaler is None else None)
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        self.batch_number += 1

    def _check_finite(self, norm: torch.Tensor | float | None) -> None:
        """Raise FloatingPointError in all processes if a loss or gradient norm is not finite in one of them.

        The weights have not changed yet, except with DeepSpeed, which updates them in the backward pass. The values are read
        from the device once per step.
        """
        values = {"loss": self.losses["loss"]}
        if norm is not None:  # a tensor, a DTensor with FSDP2, a float with DeepSpeed
            values["gradient norm"] = whole(torch.as_tensor(norm)).to(values["loss"]).reshape(())
        bad = (~torch.stack(list(values.values())).isfinite()).float()
        everywhere = self.accelerator.reduce(bad, "sum")  # a process that raised alone would leave the others waiting
        if not everywhere.sum().item():
            return
        index = int(everywhere.nonzero()[0])  # the loss first: if it is not finite, neither are the gradients
        name, value = list(values.items())[index]
        found = list_checkpoints(self.output)
        where = "" if bad[index] else ", and not finite in another process"
        last = f"the last checkpoint is {str(found[-1])!r}" if found else "there is no checkpoint"
        raise FloatingPointError(
            f"the {name} is {value.item()} at step {self.step + 1}{where}; {last}. Use a lower `learning_rate`, or check the data."
        )

    def _finish_step(self, limit: float) -> None:
        """Update the averaged weights, the progress bar and the log after a step."""
        accelerator = self.accelerator
        self.ema.step(self._trained_parameters())
        self.step += 1
        self.bar.update()
        if self.step % self.arguments.logging_steps == 0:
            metrics = {name: accelerator.reduce(loss, "mean").item() for name, loss in self.losses.items()}
            metrics["learning_rate"] = self.schedules[0].get_last_lr()[0]
            self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", lr=f"{metrics['learning_rate']:.2e}")
            accelerator.log(metrics, step=self.step)
        self.losses = {}
        self.seconds = time.perf_counter() - self.start
        if limit < math.inf:  # all processes must stop at the same step
            self.seconds = accelerator.reduce(torch.tensor(self.seconds, device=accelerator.device), "mean").item()

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.accelerator,
            self.output,
            self.step,
            self.arguments.checkpoints_total_limit,
            self.settings | {"seconds": self.seconds},
            add=functools.partial(save_average, self.accelerator, self.ema, self.transformer),
        )


def frozen_weights(transformer: torch.nn.Module) -> dict[str, str]:
    """Return the hash of the frozen weights as a setting; an empty dictionary if all weights are trained."""
    frozen = {name: each for name, each in transformer.named_parameters() if not each.requires_grad}
    if not frozen:
        return {}
    return {"frozen_weights": tensors_hash(frozen)}


def _check_batch_size(arguments: RunArguments, clips: MixedClips, accelerator: Accelerator) -> None:
    if len(clips) < arguments.train_batch_size * accelerator.num_processes:
        raise ValueError(
            f"`train_batch_size` times the number of processes must be at most the number of windows, {len(clips)}, got "
            f"{arguments.train_batch_size} times {accelerator.num_processes}: use a smaller batch or fewer processes."
        )


def _configure(transformer: Denoiser, arguments: RunArguments) -> None:
    """Apply the options of the model that do not change its results."""
    if arguments.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if arguments.attention_backend:
        transformer.set_attention_backend(arguments.attention_backend)
    if arguments.compile:
        torch._dynamo.config.cache_size_limit = 64  # one graph per window length, with and without gradients
        transformer.compile_repeated_blocks(dynamic=False)


def log_size(
    transformer: Denoiser,
    clips: MixedClips,
    num_episodes: int,
    accelerator: Accelerator,
) -> None:
    """Log the number of parameters, windows, episodes and processes."""
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    used = sum(len({number for number, _ in part.windows}) for part in clips.clips)
    logger.info(
        f"{parameters / 1e6:.2f} M parameters, {len(clips)} windows of {used} episodes, {num_episodes - used} episodes skipped, "
        f"{accelerator.num_processes} processes ({accelerator.distributed_type.value})"
    )
