"""Training loop, arguments and checkpoints shared by the example scripts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import DataArguments, RunArguments, check_frame_size, check_run_arguments, check_snr_gamma
    from .checkpoints import (
        check_resume,
        list_checkpoints,
        newest_checkpoint,
        remove_leftovers,
        save_checkpoint,
        save_finished,
        seconds_trained,
        step_of,
    )
    from .datasets import check_held_out, check_same_size, load_frames, open_sources
    from .launch import check_output_dir, default_mixed_precision, lock_output, prepare_output, start_accelerator
    from .objective import diffusion_loss
    from .pretrained import is_pipeline, load_autoencoder, load_transformer, load_vae, update_config
    from .run import TrainingData, encode_data, train
    from .saving import finished_pipeline, load_sampler
    from .scripts import Interruption, check_launch, check_ranges, exit_without_extra, run_script, stop_training

# modules of the public names; each module is imported on first use, so that scripts without training do not wait for diffusers
_MODULES = {
    "DataArguments": "arguments",
    "Interruption": "scripts",
    "RunArguments": "arguments",
    "TrainingData": "run",
    "check_frame_size": "arguments",
    "check_held_out": "datasets",
    "check_launch": "scripts",
    "check_output_dir": "launch",
    "check_ranges": "scripts",
    "check_resume": "checkpoints",
    "check_run_arguments": "arguments",
    "check_same_size": "datasets",
    "check_snr_gamma": "arguments",
    "default_mixed_precision": "launch",
    "diffusion_loss": "objective",
    "encode_data": "run",
    "exit_without_extra": "scripts",
    "finished_pipeline": "saving",
    "is_pipeline": "pretrained",
    "list_checkpoints": "checkpoints",
    "load_autoencoder": "pretrained",
    "load_frames": "datasets",
    "load_sampler": "saving",
    "load_transformer": "pretrained",
    "load_vae": "pretrained",
    "lock_output": "launch",
    "newest_checkpoint": "checkpoints",
    "open_sources": "datasets",
    "prepare_output": "launch",
    "remove_leftovers": "checkpoints",
    "run_script": "scripts",
    "save_checkpoint": "checkpoints",
    "save_finished": "checkpoints",
    "seconds_trained": "checkpoints",
    "start_accelerator": "launch",
    "step_of": "checkpoints",
    "stop_training": "scripts",
    "train": "run",
    "update_config": "pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "DataArguments",
    "Interruption",
    "RunArguments",
    "TrainingData",
    "check_frame_size",
    "check_held_out",
    "check_launch",
    "check_output_dir",
    "check_ranges",
    "check_resume",
    "check_run_arguments",
    "check_same_size",
    "check_snr_gamma",
    "default_mixed_precision",
    "diffusion_loss",
    "encode_data",
    "exit_without_extra",
    "finished_pipeline",
    "is_pipeline",
    "list_checkpoints",
    "load_autoencoder",
    "load_frames",
    "load_sampler",
    "load_transformer",
    "load_vae",
    "lock_output",
    "newest_checkpoint",
    "open_sources",
    "prepare_output",
    "remove_leftovers",
    "run_script",
    "save_checkpoint",
    "save_finished",
    "seconds_trained",
    "start_accelerator",
    "step_of",
    "stop_training",
    "train",
    "update_config",
]
