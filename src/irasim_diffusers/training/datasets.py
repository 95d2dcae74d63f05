"""Datasets of a training run: checks before encoding, cached latents and held-out clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ReadInstruction
from tqdm.auto import tqdm

from ..data import (
    IRASimFolder,
    LatentClips,
    LeRobotFolder,
    PreparedEpisodes,
    TableEpisodes,
    cache_latents,
    check_equal_size,
    check_mixture,
    first_readable,
    frame_skip_for,
    open_dataset,
    standardised_states,
)
from ..latents import Autoencoder, downsampling_factor
from .arguments import DataArguments, RunArguments
from .rollouts import clip_length


def open_source(
    name: str, arguments: RunArguments, split: str, max_episodes: int | None, all_phases: bool
) -> PreparedEpisodes:
    """Open a dataset with the requested cameras, frame size and actions.

    Args:
        name: Folder or Hub id.
        arguments: Arguments of the run.
        split: Split of the dataset, or a part such as `train[:90%]`.
        max_episodes: Maximum number of episodes; None for all.
        all_phases: Keep all frames, so that windows with skipped frames can start at any frame.

    Raises:
        ValueError: If the dataset cannot be opened or does not match the arguments.
        OSError: If it cannot be downloaded.
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
    """Open the training datasets; check them against arguments and validation data before any work.

    Raises:
        ValueError: If a dataset cannot be opened or read, or the datasets cannot be mixed or do not match the arguments or the
            validation data.
        OSError: If a dataset cannot be downloaded.
    """
    sources = [
        open_source(name, arguments, arguments.split, arguments.max_train_episodes, all_phases=True)
        for name in arguments.dataset
    ]
    check_mixture(sources)
    check_data(sources, arguments)
    return sources


def check_data(sources: list[PreparedEpisodes], arguments: RunArguments) -> None:
    """Check the arguments and the validation data against the training data, before encoding.

    Raises:
        ValueError: If the training or validation data cannot be read, the action components or state features do not match the
            arguments, the training datasets differ in their number of action components, or the validation data share episodes
            with the training data, or differ from them in frame rate, cameras, actions or frame size.
        OSError: If the validation data cannot be downloaded.
    """
    vectors = first_readable(sources[0], sources[0].vectors)
    action_dim = vectors["action"].shape[1]
    for name in ("action_scale", "action_offset"):
        values = getattr(arguments, name, [])
        if len(values) not in (0, 1, action_dim):
            raise ValueError(
                f"`{name}` must be one number or {action_dim} numbers, one per action component, got {values}."
            )
    missing = [key for key in arguments.state_keys if key not in vectors]
    if missing:
        raise ValueError(
            f"`state_keys` must be among the vector features {sorted(vectors)} of {sources[0].name!r}, got {missing[0]!r}."
        )
    for source in sources[1:]:
        found = first_readable(source, source.vectors)["action"].shape[1]
        if found != action_dim:
            raise ValueError(
                f"{sources[0].name!r} and {source.name!r} must have the same number of action components, got {action_dim} and "
                f"{found}: pad the actions with `pad_actions_to`, or use only one of them."
            )
    if arguments.validation_dataset is None:
        return
    held_out = open_source(arguments.validation_dataset, arguments, arguments.validation_split, None, all_phases=False)
    check_held_out(sources, arguments.dataset, held_out, arguments)
    check_mixture([sources[0], held_out])
    found = first_readable(held_out, held_out.vectors)["action"].shape[1]
    if found != action_dim:
        raise ValueError(
            f"`validation_dataset` must have {action_dim} action components like the training data, got {found}."
        )
    if arguments.recorded_latents or arguments.streaming:  # frames may be absent or must be downloaded
        return
    check_same_size(sources[0], held_out)


def check_same_size(source: PreparedEpisodes, held_out: PreparedEpisodes) -> None:
    """Check that the frames of training and validation data have the same size.

    Raises:
        ValueError: If the first readable frames differ in size, or no frame can be read.
    """
    wanted, size = _frame_size(source), _frame_size(held_out)
    if size != wanted:
        raise ValueError(
            f"`validation_dataset` must have frames of {_shown(wanted)} (height x width) like the training data, got "
            f"{_shown(size)}: resize both with `height` and `width`."
        )


def check_held_out(
    sources: list[PreparedEpisodes], names: list[str], held_out: PreparedEpisodes, arguments: DataArguments
) -> None:
    """Check that no training episode is also a validation episode.

    Args:
        sources: The training datasets.
        names: Their folders or Hub ids.
        held_out: The validation dataset.
        arguments: Name and split of the validation dataset, and the split of the training datasets.

    Raises:
        ValueError: If the splits of the same folder or Hub id share episodes.
    """
    for source, name in zip(sources, names, strict=True):
        if os.path.realpath(name) != os.path.realpath(arguments.validation_dataset or ""):
            continue
        shared = _episodes(source, arguments.split) & _episodes(held_out, arguments.validation_split)
        if shared:
            raise ValueError(
                f"`split` and `validation_split` must not share episodes of the same dataset, got {arguments.split!r} and "
                f"{arguments.validation_split!r} of {name!r}, which share {len(shared)}: use disjoint splits, or parts "
                "such as 'train[:90%]' and 'train[90%:]' if the format supports them."
            )


def _episodes(prepared: PreparedEpisodes, split: str) -> set[Any]:
    """Return keys that identify the episodes of a source within its folder or repository."""
    source = prepared.source
    if isinstance(source, LeRobotFolder):
        return {row["episode_index"] for row in source.rows}
    if isinstance(source, IRASimFolder):
        return {path.resolve() for path in source.files}
    assert isinstance(source, TableEpisodes)
    sizes = {name: each.num_examples for name, each in (source.dataset.info.splits or {}).items()}
    if split.split("[")[0].split("+")[0] not in sizes:
        return {(split, row) for row in range(len(source))}
    parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    rows = [
        (part.splitname, row) for part in parts for row in range(part.from_ or 0, part.to or sizes[part.splitname])
    ]
    return set(rows[: len(source)])


def check_frames(sources: list[PreparedEpisodes], vae: Autoencoder | None, patch_size: int) -> tuple[int, int]:
    """Check before encoding that the first readable frames have equal sizes and consist of patches.

    Args:
        sources: The training datasets.
        vae: Autoencoder of the latents; None for pixel space.
        patch_size: Side of the patches in latent pixels.

    Returns:
        The height and width.

    Raises:
        ValueError: If no frame of a dataset can be read, the height or width of its first one is not divisible by the size of a
            patch in pixels, or the frames of two datasets differ in size.
    """
    multiple = downsampling_factor(vae) * patch_size
    sizes = [_frame_size(source) for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        _check_divisible(source, size, multiple)
        if size != sizes[0]:
            raise ValueError(
                f"{sources[0].name!r} and {source.name!r} must have frames of the same size, got {_shown(sizes[0])} and "
                f"{_shown(size)} (height x width): resize both with `height` and `width`."
            )
    return sizes[0]


def _frame_size(source: PreparedEpisodes) -> tuple[int, int]:
    """Return the height and width of the first readable frame."""
    height, width = first_readable(source, lambda number: source.window(number, 0, 1)).frames.shape[1:3]
    return height, width


def _shown(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def _check_divisible(source: PreparedEpisodes, size: tuple[int, int], multiple: int) -> None:
    height, width = size
    if height % multiple or width % multiple:
        nearest = [max(round(side / multiple), 1) * multiple for side in (height, width)]
        raise ValueError(
            f"frames of {source.name!r} must have sides divisible by {multiple}, got {height}x{width}: use "
            f"--height {nearest[0]} --width {nearest[1]}."
        )


def cache_sources(
    sources: list[PreparedEpisodes],
    vae: Autoencoder | None,
    frame_size: tuple[int, int] | None,
    arguments: RunArguments,
    accelerator: Accelerator,
) -> list[Path]:
    """Encode the datasets with `cache_latents`, split over the processes; return the folders.

    Raises:
        ValueError: If an episode cannot be encoded or has another frame size than `frame_size`, and `skip_broken` is not set, or none can.
        OSError: If a file cannot be downloaded or written.
    """
    return [
        cache_latents(
            source,
            vae,
            arguments.cache_dir or Path(arguments.output_dir) / "latents",
            mixed_precision=accelerator.mixed_precision == "bf16",
            skip_broken=arguments.skip_broken,
            recorded=arguments.recorded_latents,
            frame_size=frame_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            wait_for_everyone=accelerator.wait_for_everyone,
        )
        for source in sources
    ]


def cached_clips(
    folders: list[Path], sources: list[PreparedEpisodes], arguments: RunArguments, length: int
) -> list[LatentClips]:
    """Open each dataset's cached latents as clips of `length` frames, with the states of `state_keys`.

    Raises:
        ValueError: If a cache is damaged, its episodes differ in shape, an episode is shorter than a clip and `skip_broken` is not
            set, all are shorter, the states cannot be read or do not match the arguments, or `crop_size` exceeds the latents.
    """
    parts = [
        LatentClips(folder, length, skip_short=arguments.skip_broken, frame_skip=source.frame_skip)
        for folder, source in zip(folders, sources, strict=True)
    ]
    if arguments.state_keys:
        numbers = [part.episodes for part in parts]
        known = standardised_states(sources, arguments.state_keys, arguments.state_angles, numbers)
        for part, states in zip(parts, known, strict=True):
            part.states = states
    # the size of recorded latents is known only here; other sizes are checked before encoding
    check_crop_fits(arguments.crop_size, parts[0].latent_size)
    return parts


def check_crop_fits(crop_size: int | None, latent_size: tuple[int, int]) -> None:
    """Check that `crop_size` is at most the height and width of the latents; raise ValueError otherwise."""
    if (crop_size or 0) > min(latent_size):
        height, width = latent_size
        raise ValueError(
            f"`crop_size` must be at most the smaller side of the {height}x{width} latents, got {crop_size}."
        )


def load_frames(dataset: PreparedEpisodes, per_episode: int, skip_broken: bool) -> torch.Tensor:
    """Read evenly spaced frames (N, 3, H, W), uint8, of each episode.

    Raises:
        ValueError: If an episode cannot be read or differs in frame size and `skip_broken` is False, or no episode can be read.
    """
    frames: list[np.ndarray] = []
    for number in tqdm(range(len(dataset)), desc="reading frames", unit="episode"):
        try:
            episode = dataset[number]
            if frames:
                check_equal_size(frames[0].shape[1:3], episode.frames, f"episode {number} of {dataset.name!r}")
        except ValueError as error:
            if not skip_broken:
                raise
            tqdm.write(f"skipped: {error}")
            continue
        chosen = np.linspace(0, len(episode) - 1, min(per_episode, len(episode))).astype(int)
        frames.append(episode.frames[chosen])
    if not frames:
        raise ValueError(f"no episode of {dataset.name!r} can be read.")
    return torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2)


def validation_clips(arguments: RunArguments, config: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Read held-out clips as long as training clips, each from the middle of an episode.

    At most `num_validation_clips` clips are read, from the first episodes.

    Args:
        arguments: Arguments of the run.
        config: Config of the model.

    Returns:
        Frames (N, F, H, W, 3), uint8, of which the first h are history, and actions (N, F - h, A); None without a validation
        dataset.

    Raises:
        ValueError: If the dataset cannot be opened, an episode cannot be read or is too short (unless `skip_broken` is set), no
            episode is left, or the frames of two episodes differ in size.
        OSError: If the dataset cannot be downloaded.
    """
    if arguments.validation_dataset is None:
        return None
    frames: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    source = open_source(arguments.validation_dataset, arguments, arguments.validation_split, None, all_phases=False)
    wanted = clip_length(config, arguments.rollout_chunks)
    for number in range(len(source)):
        try:
            length = len(source.vectors(number)["action"])
            if length < wanted:
                raise ValueError(
                    f"episode {number} of {arguments.validation_dataset!r} has {length} frames, fewer than a clip of "
                    f"{wanted}: use a smaller `rollout_chunks` or, in train.py, `sample_frames`, or skip it with --skip_broken."
                )
            clip = source.window(number, (length - wanted) // 2, wanted)
            if frames:
                name = f"episode {number} of {arguments.validation_dataset!r}"
                check_equal_size(frames[0].shape[1:3], clip.frames, name)
        except ValueError:
            if not arguments.skip_broken:
                raise
            continue
        frames.append(clip.frames)
        actions.append(clip.actions[config["num_history_frames"] - 1 : -1])
        if len(frames) == arguments.num_validation_clips:
            break
    if not frames:
        raise ValueError(
            f"no episode of {arguments.validation_dataset!r} is readable and has at least {wanted} frames, the length of a clip."
        )
    return np.stack(frames), np.stack(actions)
