"""Training: objective, own rollouts, checkpoints, and the behaviour of training scripts."""

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
)
from .objective import NoiseProcess, StateReadout, add_noise, diffusion_loss, diffusion_target, min_snr_weights
from .rollouts import clip_length, crop, predict_chunk
from .scripts import Interruption, check_launch, require_finite, run_script

__all__ = [
    "Interruption",
    "NoiseProcess",
    "StateReadout",
    "add_noise",
    "averaged_state",
    "check_launch",
    "checkpoints",
    "clip_length",
    "crop",
    "diffusion_loss",
    "diffusion_target",
    "load_average",
    "min_snr_weights",
    "newest_checkpoint",
    "predict_chunk",
    "remove_leftovers",
    "require_finite",
    "run_script",
    "save_average",
    "save_checkpoint",
    "save_finished",
    "seconds_trained",
]
