"""Training: arguments, data, objective, loop, checkpoints and validation of the training scripts."""

from .arguments import (
    MAY_CHANGE,
    DataArguments,
    RunArguments,
    check_crop,
    check_frame_size,
    check_ranges,
    check_run_arguments,
)
from .checkpoints import (
    averaged_state,
    checkpoints,
    load_average,
    newest_checkpoint,
    remove_leftovers,
    save_average,
    save_checkpoint,
    save_finished,
    seconds_trained,
    step_of,
)
from .datasets import (
    cache_sources,
    cached_clips,
    check_data,
    check_frames,
    open_source,
    open_sources,
    validation_clips,
)
from .launch import prepare_output, start_accelerator
from .loop import TrainingRun, log_size, run_settings
from .loss import training_loss
from .objective import NoiseProcess, StateReadout, add_noise, diffusion_loss, diffusion_target, min_snr_weights
from .optimizers import build_optimizers, build_schedules
from .pretrained import is_pipeline, load_autoencoder, load_transformer, load_vae, same_latents
from .rollouts import clip_length, crop, predict_chunk
from .run import TrainingData, encode_data, train
from .saving import finished_pipeline, load_sampler, make_pipeline
from .scripts import Interruption, check_launch, require_finite, run_script
from .validation import validate, validate_run

__all__ = [
    "MAY_CHANGE",
    "DataArguments",
    "Interruption",
    "NoiseProcess",
    "RunArguments",
    "StateReadout",
    "TrainingData",
    "TrainingRun",
    "add_noise",
    "averaged_state",
    "build_optimizers",
    "build_schedules",
    "cache_sources",
    "cached_clips",
    "check_crop",
    "check_data",
    "check_frame_size",
    "check_frames",
    "check_launch",
    "check_ranges",
    "check_run_arguments",
    "checkpoints",
    "clip_length",
    "crop",
    "diffusion_loss",
    "diffusion_target",
    "encode_data",
    "finished_pipeline",
    "is_pipeline",
    "load_autoencoder",
    "load_average",
    "load_sampler",
    "load_transformer",
    "load_vae",
    "log_size",
    "make_pipeline",
    "min_snr_weights",
    "newest_checkpoint",
    "open_source",
    "open_sources",
    "predict_chunk",
    "prepare_output",
    "remove_leftovers",
    "require_finite",
    "run_script",
    "run_settings",
    "same_latents",
    "save_average",
    "save_checkpoint",
    "save_finished",
    "seconds_trained",
    "start_accelerator",
    "step_of",
    "train",
    "training_loss",
    "validate",
    "validate_run",
    "validation_clips",
]
