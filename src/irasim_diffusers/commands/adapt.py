"""`irasim adapt`: change the architecture of a trained model before further training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dataset import add_dataset_flags, frame_size, open_dataset
from .files import check_flag_ranges, check_name, check_output_folder, named_flags
from .loading import load_checked, load_vae

if TYPE_CHECKING:
    import torch

    from .. import IRASimPipeline, IRASimTransformer3DModel
    from ..latents import Autoencoder

CHANGES = (
    "prediction_type",
    "vae",
    "patch_size",
    "action_frequencies",
    "action_dim",
    "moving_layers",
)
LIMITS = {
    "patch_size": (1, 64),
    "action_dim": (1, 1024),
    "action_frequencies": (0, 32),
    "moving_layers": (1, 64),
}
"""Lowest and highest value of each flag; the highest bounds the memory that a flag can request."""
EPISODES = 32
"""Maximum number of episodes to which the patch layers are fitted for a new autoencoder."""
FRAMES = 16
"""Number of frames per episode."""


def add_parser(subparsers: Any) -> None:
    """Add `adapt` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "adapt",
        help="change patch size, autoencoder, actions, prediction type or moving layers of a trained model",
        description="Change the architecture of a trained model before further training: patch size, autoencoder, number of "
        "action components, action frequencies, prediction type or moving layers. Weights that the change does not affect are "
        "kept.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", required=True, help="pipeline folder or Hub id")
    add("--output", type=Path, required=True, help="pipeline folder to write")
    add(
        "--patch-size",
        type=int,
        help="side of the patches in latent pixels; only for Frame-Ada with fixed positions on a grid (spatial_position grid)",
    )
    add(
        "--vae",
        help="new autoencoder: folder or Hub id, optionally with ':<subfolder>'; requires --dataset, to whose frames the patch "
        "layers are fitted",
    )
    add(
        "--action-dim", type=int, help="number of action components; the action encoder and the action space are reset"
    )
    add(
        "--action-frequencies",
        type=int,
        help="number of octaves of the actions' sine and cosine features, at least the model's; same models as --patch-size",
    )
    add(
        "--prediction-type",
        choices=("sample",),
        help="predict samples instead of velocities; only for v_prediction models",
    )
    add(
        "--moving-layers",
        type=int,
        help="number of layers that move rigidly, at most one per object; only for "
        "Frame-Ada models with prediction_type sample and relative_latents",
    )
    add_dataset_flags(parser, "train", "height", "width", required=False)


def run(arguments: argparse.Namespace) -> None:
    """Check the flags, load the pipeline, change it, and write the new one."""
    check_flags(arguments)

    import torch

    from .. import IRASimPipeline
    from ..files import temporary_folder
    from ..training import finished_pipeline, load_sampler

    model, wanted = arguments.model, "a pipeline folder or Hub id"
    pipeline = load_checked("--model", wanted, model, IRASimPipeline.from_pretrained, dtype=torch.float32)
    with named_flags(other="--vae"):
        transformer, vae = _adapted(arguments, pipeline)
    with temporary_folder(arguments.output) as partial:
        finished_pipeline(vae, transformer, load_sampler(arguments.model)).save_pretrained(partial)
    config = transformer.config
    print(
        f"patches of {config.patch_size} latent pixels, {config.in_channels} channels, {config.action_dim} action components, "
        f"{config.moving_layers} moving layers; wrote {arguments.output}"
    )


def check_flags(arguments: argparse.Namespace) -> None:
    """Check the flags that need neither a model nor data.

    Raises:
        ValueError: If a flag is missing or invalid.
    """
    if not any(getattr(arguments, name) is not None for name in CHANGES):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in CHANGES)
        raise ValueError(f"at least one change is required: {flags}.")
    check_flag_ranges(arguments, LIMITS)
    frame_size(arguments)
    if (arguments.vae is None) != (arguments.dataset is None):
        raise ValueError(
            "--vae and --dataset must be passed together: the patch layers are fitted to frames of the dataset."
        )
    check_output_folder(arguments.output, empty=True)
    for name in ("model", "vae"):
        check_name(f"--{name}", getattr(arguments, name) or "")


def _adapted(
    arguments: argparse.Namespace, pipeline: IRASimPipeline
) -> tuple[IRASimTransformer3DModel, Autoencoder | None]:
    """Apply the changes in the order of `CHANGES`; return the new transformer and its autoencoder."""
    from .. import IRASimTransformer3DModel
    from ..conversion import (
        add_moving_layers,
        change_action_dim,
        change_patch_size,
        fit_autoencoder,
        predict_samples,
    )

    transformer, vae = pipeline.transformer, pipeline.vae
    if not isinstance(transformer, IRASimTransformer3DModel):
        raise ValueError(
            f"--model must be a pipeline with a transformer, got {type(transformer).__name__} in {arguments.model!r}."
        )
    if arguments.prediction_type:
        transformer = predict_samples(transformer)
    if arguments.vae:
        if vae is None:
            raise ValueError(f"--vae must be omitted: {arguments.model!r} is a pixel-space model.")
        other = load_vae(arguments.vae)
        transformer, vae = fit_autoencoder(transformer, vae, other, _images(arguments)), other
    if arguments.patch_size is not None or arguments.action_frequencies is not None:
        patch_size = arguments.patch_size or transformer.config.patch_size
        _check_patch_size(patch_size, transformer.config)
        transformer = change_patch_size(transformer, patch_size, arguments.action_frequencies)
    if arguments.action_dim is not None:
        transformer = change_action_dim(transformer, arguments.action_dim)
    if arguments.moving_layers is not None:
        transformer = add_moving_layers(transformer, arguments.moving_layers)
    return transformer, vae


def _check_patch_size(patch_size: int, config: Any) -> None:
    if config.sample_height % patch_size or config.sample_width % patch_size:
        raise ValueError(
            f"--patch-size must divide the sides of the latents, {config.sample_height}x{config.sample_width}, got {patch_size}."
        )


def _images(arguments: argparse.Namespace) -> torch.Tensor:
    """Read frames (N, 3, H, W) in [-1, 1] of the readable episodes among the first `EPISODES`.

    Raises:
        ValueError: If no episode can be read, or the frames of two episodes differ in size.
    """
    import torch

    from ..data import PreparedEpisodes, check_equal_size

    size = frame_size(arguments)
    source = PreparedEpisodes(open_dataset(arguments), frame_size=size)
    parts, reason = [], "the dataset has no episodes."
    for index in range(min(len(source), EPISODES)):
        try:
            frames = source[index].frames
        except ValueError as error:  # training reports or skips broken episodes
            reason = str(error)
            continue
        parts.append(frames[np.linspace(0, len(frames) - 1, FRAMES).astype(int)])
        check_equal_size(parts[0].shape[1:3], frames, f"episode {index} of {arguments.dataset!r}")
    if not parts:
        raise ValueError(
            f"none of the first {min(len(source), EPISODES)} episodes of {arguments.dataset!r} can be read: {reason}"
        )
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2) / 127.5 - 1
