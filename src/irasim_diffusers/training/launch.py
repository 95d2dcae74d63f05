"""Create the accelerator and the output folder of a training script, and check how it was launched."""

from __future__ import annotations

import logging
import os
from dataclasses import MISSING, fields
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DataLoaderConfiguration,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from huggingface_hub import create_repo

from ..devices import fast_dtype
from ..files import check_writable
from .arguments import MAY_CHANGE, RunArguments
from .checkpoints import FINISHED, check_resume, remove_leftovers
from .scripts import check_launch

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


PARTS = ("transformer", "vae", "scheduler")
"""Subfolders of a trained pipeline."""
FILES = (
    *("model_index.json", "config.json", "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"),
    "README.md",
)
"""Files of a trained pipeline, model or adapter."""
_LOCKED: list[IO[str]] = []
"""Lock files, which stay open until the process ends."""


def start_accelerator(arguments: RunArguments) -> Accelerator:
    """Create the accelerator of a training run; set up the log, TF32 and the seed.

    Raises:
        ValueError: If the launcher, the precision or the distributed type does not match the arguments, or if the output folder
            cannot be used (see `check_output_dir`) or contains a run with other arguments or more steps.
    """
    output = Path(arguments.output_dir)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision or default_mixed_precision(),
        log_with=arguments.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # a process that has encoded its share of the data waits for the others
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_launch(accelerator)
    check_output_dir(output)
    _check_accelerator(accelerator, arguments)
    torch.backends.cuda.matmul.allow_tf32 = arguments.allow_tf32
    settings = fixed_settings(arguments, accelerator)
    check_resume(output, settings, default_settings(arguments), arguments.max_train_steps)
    set_seed(arguments.seed)
    return accelerator


def default_mixed_precision() -> str:
    """Return the precision of `accelerate launch`; if that is no, bf16 or no, depending on the device."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    device = None if use_cpu else torch.accelerator.current_accelerator()
    return "bf16" if fast_dtype(device or "cpu") == torch.bfloat16 else "no"


def fixed_settings(arguments: RunArguments, accelerator: Accelerator) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed."""
    flags = {name: value for name, value in vars(arguments).items() if name not in MAY_CHANGE}
    return flags | {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}


def default_settings(arguments: RunArguments) -> dict[str, Any]:
    """Return the defaults of arguments other than lists, for settings that older checkpoints do not have."""
    return {each.name: each.default for each in fields(arguments) if each.default is not MISSING}


def _check_accelerator(accelerator: Accelerator, arguments: RunArguments) -> None:
    """Check precision, accumulation and distributed type, and set up FSDP and DeepSpeed.

    With FSDP, raw actions stay in float32. DeepSpeed clips the gradient to `max_grad_norm`.
    """
    if arguments.optimizer == "muon" and accelerator.mixed_precision == "fp16":
        raise ValueError("`optimizer` muon does not support `mixed_precision` fp16: use bf16 or no.")
    if accelerator.gradient_accumulation_steps != arguments.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` must be {accelerator.gradient_accumulation_steps} like that of `accelerate launch`, "
            f"got {arguments.gradient_accumulation_steps}: pass the same value to both, or remove it from the accelerate config."
        )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if arguments.optimizer == "muon":
        raise ValueError(f"`optimizer` muon does not support {kind.value}: use adamw.")
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"FSDP must be version 2, got {plugin.fsdp_version}: use examples/accelerate_configs/fsdp2.yaml."
            )
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast casts the inputs
    elif accelerator.state.deepspeed_plugin.zero_stage > 2:
        raise ValueError(
            f"the ZeRO stage of DeepSpeed must be at most 2, got {accelerator.state.deepspeed_plugin.zero_stage}: use "
            "examples/accelerate_configs/zero2.yaml, or FSDP."
        )
    else:  # DeepSpeed clips gradients itself
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = arguments.max_grad_norm


def lock_output(output: Path) -> None:
    """Lock an output folder until this process ends, so that two runs do not write the same checkpoints.

    On Windows and on file systems without locks, the folder is only checked.

    Raises:
        ValueError: If another process trains in the folder, or `check_output_dir` fails.
        OSError: If the lock file cannot be created.
    """
    check_output_dir(output)
    if fcntl is None:
        return
    file = (output / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"`output_dir` {str(output)!r} is in use by another training run: wait for it, or use another folder."
        ) from error
    except OSError:  # a file system without locks
        return
    _LOCKED.append(file)


def check_output_dir(output: Path) -> None:
    """Check that results can be written to an output folder, and that it is not a dataset.

    Args:
        output: The folder; it need not exist.

    Raises:
        ValueError: If it is a file or cannot be written, contains a dataset, a file or symbolic link in the place of a checkpoint,
            a temporary folder or a subfolder of the pipeline, or a folder in the place of a file of the result.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {str(output)!r}.")
    check_writable("`output_dir`", output, output)
    for name in ("meta/info.json", "annotation", "dataset_info.json", "dataset_dict.json"):
        if (output / name).exists():
            raise ValueError(f"`output_dir` must not be a dataset, got {str(output)!r}, which contains {name!r}.")
    places = [*output.glob("checkpoint-*"), *output.glob("partial-*"), *(output / name for name in (FINISHED, *PARTS))]
    for path in places:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ValueError(
                f"{str(path)!r} must be a folder and not a link: remove it, or choose another `output_dir`."
            )
    for path in (output / name for name in FILES):
        if path.is_dir():
            raise ValueError(
                f"{str(path)!r} must be a file, but is a folder: rename it, or choose another `output_dir`."
            )


def prepare_output(accelerator: Accelerator, output: Path, hub_model_id: str | None = None) -> None:
    """Create and lock the output folder of a run, and remove the temporary files of interrupted runs.

    Args:
        accelerator: Accelerator of the run. Every process must call this function.
        output: The folder.
        hub_model_id: Repository to create on the Hub, so that a missing permission is noticed before the training, or None.

    Raises:
        ValueError: If the folder cannot be created, `lock_output` fails, or `hub_model_id` is not a valid name.
        OSError: If the folder cannot be written, or the repository cannot be created (HfHubHTTPError).
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder that can be created, got {str(output)!r}: {error.strerror}."
        ) from error
    if accelerator.is_main_process:
        lock_output(output)
        remove_leftovers(output)
        if hub_model_id is not None:
            create_repo(hub_model_id, exist_ok=True)
    accelerator.wait_for_everyone()
