"""Data, training loop and validation, shared by train.py, train_lora.py and pusht/convolutional.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..data import LatentClips, MixedClips, PreparedEpisodes
from ..latents import Autoencoder, downsampling_factor
from ..models import Denoiser
from .arguments import RunArguments, check_chunks, check_crop, check_snr_gamma
from .datasets import cache_sources, cached_clips, check_crop_fits, check_frames, validation_clips
from .launch import prepare_output
from .loop import TrainingRun, log_size
from .rollouts import clip_length
from .validation import validate_run


@dataclass(frozen=True)
class TrainingData:
    """The encoded datasets of a run."""

    sources: list[PreparedEpisodes]
    vae: Autoencoder | None
    folders: list[Path]
    """Folders of the cached latents."""
    parts: list[LatentClips]
    """Clips of each dataset."""
    held_out: tuple[np.ndarray, np.ndarray] | None
    """Clips from `validation_clips`; None without a validation dataset, and in all processes but the main one."""


def encode_data(
    sources: list[PreparedEpisodes],
    vae: Autoencoder | None,
    config: Mapping[str, Any],
    arguments: RunArguments,
    accelerator: Accelerator,
) -> TrainingData:
    """Check the data, read the validation clips, create the output folder, and encode the training data.

    With `push_to_hub`, the repository is created, too.

    Args:
        sources: Datasets from `open_sources`.
        vae: The frozen autoencoder; None for pixel space.
        config: Config of the model, or the entries of a new one.
        arguments: Arguments of the run.
        accelerator: Accelerator of the run. Every process must call this function.

    Raises:
        ValueError: If the data or an option do not match the model, the data cannot be read or are shorter than a
            clip, the validation clips differ in shape, or `prepare_output` fails.
        OSError: If a file cannot be downloaded or written, or the repository for `push_to_hub` cannot be created.
    """
    check_crop(arguments.crop_size, config)
    check_chunks(arguments, config)
    check_snr_gamma(arguments.snr_gamma, config["prediction_type"])
    recorded = arguments.recorded_latents
    frame_size = None if recorded else check_frames(sources, vae, config.get("patch_size", 1))
    if frame_size is not None:
        factor = downsampling_factor(vae)
        check_crop_fits(arguments.crop_size, (frame_size[0] // factor, frame_size[1] // factor))
    held_out = validation_clips(arguments, config) if accelerator.is_main_process else None
    output = Path(arguments.output_dir)
    prepare_output(accelerator, output, (arguments.hub_model_id or output.name) if arguments.push_to_hub else None)
    if vae is not None:
        vae.to(accelerator.device)
    folders = cache_sources(sources, vae, frame_size, arguments, accelerator)
    parts = cached_clips(folders, sources, arguments, clip_length(config, arguments.rollout_chunks))
    return TrainingData(sources, vae, folders, parts, held_out)


def train(
    transformer: Denoiser,
    data: TrainingData,
    copy: Callable[[], Denoiser],
    arguments: RunArguments,
    accelerator: Accelerator,
) -> TrainingRun:
    """Train a model from its newest checkpoint to the end, with validation in between.

    Args:
        transformer: The model; parameters that require a gradient are trained and averaged.
        data: Data from `encode_data`.
        copy: Function that builds a model of the same structure, on the CPU.
        arguments: Arguments of the run.
        accelerator: Accelerator of the run. Every process must call this function.

    Returns:
        The finished run.

    Raises:
        ValueError: If the datasets differ in the shapes of their clips, or `TrainingRun` cannot be created.
        FloatingPointError: If the loss or the gradient is not finite.
        OSError, SafetensorError: If a checkpoint or a validation video cannot be written.
        SystemExit: After Ctrl-C or SIGTERM, when the checkpoint has been written.
    """
    clips = MixedClips(data.parts, arguments.dataset_weights or None, arguments.seed, arguments.change_share)
    log_size(transformer, clips, sum(map(len, data.sources)), accelerator)
    run = TrainingRun(accelerator, arguments, transformer, clips, data.vae, data.folders, copy)
    for step in run.steps():
        if arguments.validation_dataset and step % arguments.validation_steps == 0:
            validate_run(run, data.held_out)
    return run
