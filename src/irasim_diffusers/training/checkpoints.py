"""Checkpoints of a training run, and the averaged weights in them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import file_hash, flush, remove_abandoned, temporary_folder, write_errors_named
from ..json_files import read_json_object

logger = logging.getLogger(__name__)

FINISHED = ".finished"
"""Temporary subfolder in which the final model is saved."""

SETTINGS = "settings.json"
"""File with settings, step, training time, and the size and SHA-256 hash of every other file."""


def list_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints `checkpoint-<step>` in a folder, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(checkpoint.name.split("-")[1])


def newest_checkpoint(
    output: Path, settings: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> Path | None:
    """Return the newest complete checkpoint, or None if there is no checkpoint.

    Args:
        output: Folder of the checkpoints.
        settings: Settings that define the run; values may be dictionaries.
        defaults: Values of settings that a checkpoint of an earlier version does not contain.

    Raises:
        ValueError: If there are checkpoints but none is complete, or the settings of the newest complete one differ.
    """
    found = list_checkpoints(output)
    damaged = []
    for path in reversed(found):
        problem = _problem(path)
        if problem is None:
            _check_settings(path, settings, defaults)
            return path
        damaged.append(f"{path.name} ({problem})")
        logger.warning(f"skipped damaged checkpoint {path}: {problem}")
    if found:
        raise ValueError(
            f"no checkpoint in {str(output)!r} is complete: {', '.join(damaged)}. Delete them to train from the start."
        )
    return None


def _problem(checkpoint: Path) -> str | None:
    """Describe the first problem of a checkpoint, such as a missing file; None if it is intact."""
    try:
        stored = read_json_object(checkpoint / SETTINGS)
        sizes, hashes = stored["files"], stored.get("hashes", {})  # earlier versions stored no hashes
        valid = all(isinstance(each, dict) for each in (sizes, hashes)) and sizes
        valid = valid and 0 <= stored.get("seconds", 0.0) < float("inf")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        return f"{SETTINGS} cannot be read or does not belong to a checkpoint"
    if stored.get("step", step_of(checkpoint)) != step_of(checkpoint):
        return f"{SETTINGS} belongs to step {stored['step']}"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if name in hashes and file_hash(path) != hashes[name]:
            return f"the content of {name} has changed since it was written"
    return None


def check_resume(
    output: Path,
    settings: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    max_train_steps: int | None = None,
) -> None:
    """Compare settings with those of the newest checkpoint whose settings file is readable.

    This check comes before the data are read. Without such a checkpoint, nothing is checked.

    Args:
        output: Folder of the checkpoints.
        settings: Settings that define the run.
        defaults: Values of settings that a checkpoint of an earlier version does not contain.
        max_train_steps: Number of steps after which the run ends; None if the checkpoint may be of any step.

    Raises:
        ValueError: If a setting differs, or the checkpoint is of a later step than `max_train_steps`.
    """
    for path in reversed(list_checkpoints(output)):
        try:
            read_json_object(path / SETTINGS)
        except ValueError:
            continue  # `newest_checkpoint` reports a damaged checkpoint
        _check_settings(path, settings, defaults)
        if max_train_steps is not None and step_of(path) > max_train_steps:  # its model would replace a finished one
            raise ValueError(
                f"`max_train_steps` must be at least {step_of(path)}, the step of {str(path)!r}, got {max_train_steps}: use more "
                "steps, or another `output_dir`."
            )
        return


def _check_settings(checkpoint: Path, settings: dict[str, Any], defaults: Mapping[str, Any] | None) -> None:
    stored = read_json_object(checkpoint / SETTINGS)
    before = _flat(json.loads(json.dumps(dict(defaults or {}))) | stored)
    now = _flat(json.loads(json.dumps(settings)))  # tuples become lists
    changed = [
        f"{key} was {before[key]!r} and is {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value  # earlier versions stored fewer settings
    ]
    if changed:
        raise ValueError(
            f"{str(checkpoint)!r} belongs to a run with other settings: {', '.join(changed)}. Use the same settings to resume, or "
            "another `output_dir`."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def seconds_trained(checkpoint: Path) -> float:
    """Return the training time at a checkpoint, in seconds; 0 if an earlier version did not store it."""
    return json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8")).get("seconds", 0.0)


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    step: int,
    limit: int,
    settings: dict[str, Any],
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint under a temporary name, flush and rename it, and delete the oldest checkpoints.

    Existing checkpoints of this step or a later one are deleted, too. Such checkpoints exist only if they are damaged.

    Args:
        accelerator: Accelerator whose state is saved. Every process must call this function.
        output: Folder of the checkpoints.
        step: Number of completed steps.
        limit: Maximum number of checkpoints to keep; at least one is kept.
        settings: Settings that `newest_checkpoint` compares.
        add: Function that writes more files to the folder of the checkpoint.

    Raises:
        OSError: If a file cannot be written, for example on a full disk.
        SafetensorError: If the weights cannot be written.
    """
    partial = output / f"partial-{step}"
    try:
        with write_errors_named(partial):
            accelerator.save_state(str(partial))
            if add is not None:
                add(partial)
    except (OSError, SafetensorError, RuntimeError):
        # on a full disk, the incomplete files would occupy the remaining space
        shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()  # every process writes its own random state
    if accelerator.is_main_process:
        files = [path for path in partial.rglob("*") if path.is_file()]
        for path in files:
            flush(path)
        names = [path.relative_to(partial).as_posix() for path in files]
        content = {
            "step": step,
            "files": {name: path.stat().st_size for name, path in zip(names, files, strict=True)},
            "hashes": {name: file_hash(path) for name, path in zip(names, files, strict=True)},
        }
        (partial / SETTINGS).write_text(json.dumps(settings | content, indent=2), encoding="utf-8")
        flush(partial / SETTINGS)
        for stale in list_checkpoints(output):
            if step_of(stale) >= step:
                shutil.rmtree(stale)
        partial.rename(output / f"checkpoint-{step}")
        own = [path for path in list_checkpoints(output) if (path / SETTINGS).is_file()]
        for old in own[: -max(limit, 1)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def remove_leftovers(output: Path) -> None:
    """Delete the temporary files and folders of interrupted runs in an output folder, and nothing else."""
    remove_abandoned(output)
    for path in output.iterdir():
        if path.is_dir() and (path.name == FINISHED or re.fullmatch(r"partial-\d+", path.name)):
            shutil.rmtree(path)


def save_finished(output: Path, save: Callable[[Path], None]) -> None:
    """Save the final model to the output folder.

    Files and folders of the same names are replaced, except that a folder is never replaced by a file. `model_index.json`, which
    marks a pipeline as complete, is removed first and moved there last.

    Args:
        output: Output folder, which also contains the checkpoints.
        save: Function that writes the model to a given folder, for example `pipeline.save_pretrained`.

    Raises:
        ValueError: If a folder is in the place of a file.
        OSError: If a file cannot be written, for example on a full disk.
    """
    finished = output / FINISHED
    with temporary_folder(finished) as partial:
        save(partial)
        for path in partial.iterdir():
            if path.is_file() and (output / path.name).is_dir():
                raise ValueError(f"{str(output / path.name)!r} must be a file, but is a folder: rename or remove it.")
    if (finished / DiffusionPipeline.config_name).is_file():
        (output / DiffusionPipeline.config_name).unlink(missing_ok=True)
    for path in sorted(finished.iterdir(), key=lambda path: path.name == DiffusionPipeline.config_name):
        if (output / path.name).is_dir():
            shutil.rmtree(output / path.name)
        path.replace(output / path.name)
    finished.rmdir()


def averaged_state(ema: EMAModel, model: ModelMixin | nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a model with its averaged weights, gathered from shards, on the CPU.

    Args:
        ema: Averages of the parameters that require a gradient, in their order.
        model: The model. If it is sharded, every process must call this function.
    """
    averages = iter(ema.shadow_params)
    parameters = {
        name: next(averages) if parameter.requires_grad else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    return {name: whole(tensor).cpu() for name, tensor in (dict(model.named_buffers()) | parameters).items()}


def save_average(accelerator: Accelerator, ema: EMAModel, model: nn.Module, folder: Path) -> None:
    """Write the averaged weights to `ema.safetensors`; every process must call this function.

    Raises:
        SafetensorError: If the file cannot be written.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    averages = [whole(shadow).cpu().contiguous() for shadow in ema.shadow_params]
    if accelerator.is_main_process:
        metadata = {"optimization_step": str(ema.optimization_step)}
        save_file(dict(zip(names, averages, strict=True)), folder / "ema.safetensors", metadata)


def load_average(ema: EMAModel, model: nn.Module, folder: Path) -> None:
    """Load averages written by `save_average`, sharded like the model.

    Raises:
        ValueError: If the file does not store the number of steps.
        SafetensorError: If the file is damaged, or the average of a parameter is missing.
        RuntimeError: If an average has another shape than its parameter.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with safe_open(folder / "ema.safetensors", "pt") as file:
        steps = (file.metadata() or {}).get("optimization_step", "")
        if not steps.isdigit():
            raise ValueError(
                f"the metadata of ema.safetensors must contain the number `optimization_step`, got {steps!r}."
            )
        ema.optimization_step = int(steps)
        for name, shadow in zip(names, ema.shadow_params, strict=True):
            value = file.get_tensor(name).to(shadow.device)
            if isinstance(shadow, DTensor):
                value = distribute_tensor(value, shadow.device_mesh, shadow.placements)
            shadow.copy_(value)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
