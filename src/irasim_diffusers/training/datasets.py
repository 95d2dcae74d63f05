"""Data of a training run: checks before encoding, cached latents, and held-out clips."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import AutoencoderKL

from ..data import (
    LatentClips,
    PreparedEpisodes,
    cache_latents,
    check_mixture,
    first_readable,
    frame_skip_for,
    open_dataset,
    standardised_states,
)
from .arguments import RunArguments
from .rollouts import clip_length


def open_source(
    name: str, arguments: RunArguments, split: str, max_episodes: int | None, all_phases: bool
) -> PreparedEpisodes:
    """Open a data set with the requested cameras, frame size and actions.

    Args:
        name: Folder or Hub id.
        arguments: Arguments of the run.
        split: Split of the data set, or a part of one.
        max_episodes: Maximum number of episodes; None for all.
        all_phases: Keep all frames, so that windows of skipped frames can start at any frame.
    """
    source = open_dataset(
        name,
        arguments.cameras or None,
        split=split,
        max_episodes=max_episodes,
        fps=arguments.fps,
        action_column=arguments.action_column,
        state_columns=arguments.state_columns,
        revision=arguments.dataset_revision if name in arguments.dataset else None,
        streaming=arguments.streaming,
    )
    skip = arguments.frame_skip if arguments.target_fps is None else frame_skip_for(source.fps, arguments.target_fps)
    return PreparedEpisodes(
        source,
        arguments.action_derivation,
        arguments.state_key,
        skip,
        arguments.action_composition,
        arguments.pad_actions_to,
        arguments.frame_size,
        all_phases,
    )


def open_sources(arguments: RunArguments) -> list[PreparedEpisodes]:
    """Open the training data sets, and check them against the arguments and the validation data before any work.

    Raises:
        ValueError: If the data sets cannot be mixed, or the arguments do not match them.
    """
    sources = [
        open_source(name, arguments, arguments.split, arguments.max_train_episodes, all_phases=True)
        for name in arguments.dataset
    ]
    check_mixture(sources)
    check_data(sources, arguments)
    return sources


def check_data(sources: list[PreparedEpisodes], arguments: RunArguments) -> None:
    """Check the arguments and the validation data against the data, before they are encoded.

    Raises:
        ValueError: If the action components, state features or frame sizes do not match.
    """
    vectors = first_readable(sources[0], sources[0].vectors)
    action_dim = vectors["action"].shape[1]
    for name in ("action_scale", "action_offset"):
        values = getattr(arguments, name, [])
        if len(values) not in (0, 1, action_dim):
            raise ValueError(f"`{name}` must be one number, or {action_dim}, got {values}.")
    missing = [key for key in arguments.state_keys if key not in vectors]
    if missing:
        raise ValueError(f"{sources[0].name!r} has no vector feature {missing[0]!r}; it has {sorted(vectors)}.")
    if arguments.validation_dataset is None:
        return
    held_out = open_source(arguments.validation_dataset, arguments, arguments.validation_split, None, all_phases=False)
    check_mixture([sources[0], held_out])
    found = first_readable(held_out, held_out.vectors)["action"].shape[1]
    if found != action_dim:
        raise ValueError(
            f"`validation_dataset` must have {action_dim} action components like the training data, got {found}."
        )
    if arguments.recorded_latents or arguments.streaming:  # frames may be absent or must be downloaded
        return
    sizes = [
        first_readable(source, functools.partial(_first_frame, source)).shape[:2] for source in (sources[0], held_out)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(f"`validation_dataset` must have frames of size {sizes[0]} (height, width), got {sizes[1]}.")


def _first_frame(source: PreparedEpisodes, number: int) -> np.ndarray:
    return source.window(number, 0, 1).frames[0]


def check_frames(source: PreparedEpisodes, vae: AutoencoderKL | None, patch_size: int) -> None:
    """Check that frames can be divided into patches, before they are encoded.

    Args:
        source: The data set.
        vae: Autoencoder of the latents; None for pixel space.
        patch_size: Side of the patches in latent pixels.

    Raises:
        ValueError: If a side of the frames is not divisible.
    """
    height, width = first_readable(source, source.__getitem__).frames.shape[1:3]
    multiple = patch_size if vae is None else 2 ** (len(vae.config.block_out_channels) - 1) * patch_size
    if height % multiple or width % multiple:
        nearest = [max(round(side / multiple), 1) * multiple for side in (height, width)]
        raise ValueError(
            f"frames of {source.name!r} must have sides divisible by {multiple}, got {height}x{width}: use "
            f"--height {nearest[0]} --width {nearest[1]}."
        )


def cache_sources(
    sources: list[PreparedEpisodes], vae: AutoencoderKL | None, arguments: RunArguments, accelerator: Accelerator
) -> list[Path]:
    """Encode the data sets, shared by the processes, and return the folders of their latents."""
    return [
        cache_latents(
            source,
            vae,
            arguments.cache_dir or Path(arguments.output_dir) / "latents",
            mixed_precision=accelerator.mixed_precision == "bf16",
            skip_broken=arguments.skip_broken,
            recorded=arguments.recorded_latents,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            wait_for_everyone=accelerator.wait_for_everyone,
        )
        for source in sources
    ]


def cached_clips(
    folders: list[Path], sources: list[PreparedEpisodes], arguments: RunArguments, length: int
) -> list[LatentClips]:
    """Open the cached latents of each data set as clips of `length` frames, with the states of `state_keys`."""
    parts = [
        LatentClips(folder, length, skip_short=arguments.skip_broken, frame_skip=source.frame_skip)
        for folder, source in zip(folders, sources, strict=True)
    ]
    if arguments.state_keys:
        numbers = [part.episodes for part in parts]
        known = standardised_states(sources, arguments.state_keys, arguments.state_angles, numbers)
        for part, states in zip(parts, known, strict=True):
            part.states = states
    if (arguments.crop_size or 0) > min(parts[0].latent_size):
        raise ValueError(
            f"`crop_size` must be at most the smaller side of the latents {parts[0].latent_size}, got {arguments.crop_size}."
        )
    return parts


def validation_clips(arguments: RunArguments, config: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Read one held-out clip from the middle of each episode, as long as a training clip.

    Args:
        arguments: Arguments of the run.
        config: Config of the model.

    Returns:
        Frames (N, F, H, W, 3), uint8, and actions (N, F - h, A); None without a validation data set.

    Raises:
        ValueError: If an episode cannot be read or is too short, unless `skip_broken` is set, or if no episode is left.
    """
    if arguments.validation_dataset is None:
        return None
    frames, actions = [], []
    source = open_source(arguments.validation_dataset, arguments, arguments.validation_split, None, all_phases=False)
    wanted = clip_length(config, arguments.rollout_chunks)
    for number in range(len(source)):
        try:
            length = len(source.vectors(number)["action"])
            if length < wanted:
                raise ValueError(
                    f"episode {number} of {arguments.validation_dataset!r} has {length} frames, fewer than a clip of "
                    f"{wanted}: use a smaller `sample_frames` or `rollout_chunks`, or skip it with --skip_broken."
                )
            clip = source.window(number, (length - wanted) // 2, wanted)
        except ValueError:
            if not arguments.skip_broken:
                raise
            continue
        frames.append(clip.frames)
        actions.append(clip.actions[config["num_history_frames"] - 1 : -1])
        if len(frames) == arguments.num_validation_clips:
            break
    if not frames:
        raise ValueError(f"no episode of {arguments.validation_dataset!r} has {wanted} frames, the length of a clip.")
    return np.stack(frames), np.stack(actions)
