"""Training loop, arguments and checkpoints shared by the example scripts."""

from .arguments import (
    DataArguments,
    RunArguments,
    check_frame_size,
    check_ranges,
    check_run_arguments,
    check_snr_gamma,
)
from .checkpoints import (
    checkpoints,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    save_finished,
    seconds_trained,
    step_of,
)
from .datasets import check_held_out, open_sources
from .launch import default_mixed_precision, lock_output, prepare_output, start_accelerator
from .objective import diffusion_loss
from .pretrained import is_pipeline, load_autoencoder, load_transformer, load_vae
from .run import TrainingData, encode_data, train
from .saving import finished_pipeline, load_sampler
from .scripts import Interruption, check_launch, exit_without_extra, run_script, stop_training

__all__ = [
    "DataArguments",
    "Interruption",
    "RunArguments",
    "TrainingData",
    "check_frame_size",
    "check_held_out",
    "check_launch",
    "check_ranges",
    "check_run_arguments",
    "check_snr_gamma",
    "checkpoints",
    "default_mixed_precision",
    "diffusion_loss",
    "encode_data",
    "exit_without_extra",
    "finished_pipeline",
    "is_pipeline",
    "load_autoencoder",
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
]
