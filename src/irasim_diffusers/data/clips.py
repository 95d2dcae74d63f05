"""Clips for training: windows of cached latents with their actions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import Dataset

from ..json_files import read_json_object
from .episode import EpisodeSource

SHORTER = "shorten the windows (`sample_frames`, `frame_skip`; in the training scripts also `rollout_chunks`)"
"""Remedy for episodes that are shorter than a window."""


def standardised_states(
    datasets: Sequence[EpisodeSource],
    keys: Sequence[str],
    angles: Sequence[str] = (),
    numbers: Sequence[Iterable[int]] | None = None,
) -> list[dict[int, torch.Tensor]]:
    """Standardize states to zero mean and unit variance over all datasets.

    Args:
        datasets: The datasets.
        keys: Names of the vector features that are concatenated to form the state.
        angles: Names of the components that are angles in radians. They are replaced by their cosines and sines, which are at the
            end of the state.
        numbers: Indices of the episodes of each dataset; None for all.

    Returns:
        For each dataset, states (T, S), float32, by episode index. A constant component is zero.

    Raises:
        ValueError: If a feature or component does not exist, the vectors of an episode cannot be read or are not finite, or the
            states of two episodes or datasets differ in width.
    """
    chosen = [list(part) for part in numbers] if numbers else [list(range(len(dataset))) for dataset in datasets]
    parts = [_episode_states(dataset, keys, angles, part) for dataset, part in zip(datasets, chosen, strict=True)]
    widths = [next(iter(part.values())).shape[1] for part in parts]
    if len(set(widths)) > 1:
        found = ", ".join(f"{width} in {dataset.name!r}" for width, dataset in zip(widths, datasets, strict=True))
        raise ValueError(
            f"states must have the same number of components in all datasets, got {found}: use other `keys` (--state_keys)."
        )
    pooled = np.concatenate([states for part in parts for states in part.values()], dtype=np.float64)
    mean, deviation = pooled.mean(0), pooled.std(0)
    deviation = np.where(deviation > 1e-6, deviation, 1)
    return [
        {number: torch.from_numpy((states - mean) / deviation).float() for number, states in part.items()}
        for part in parts
    ]


def _episode_states(
    dataset: EpisodeSource, keys: Sequence[str], angles: Sequence[str], numbers: Iterable[int]
) -> dict[int, np.ndarray]:
    """Return the states (T, S) of the given episodes in raw units, by index; see `standardised_states`."""
    numbers = list(numbers)
    first = dataset.vectors(numbers[0])
    names: list[str] = []
    for key in keys:
        if key not in first:
            raise ValueError(f"`keys` (--state_keys) must be among {sorted(first)} in {dataset.name!r}, got {key!r}.")
        names += dataset.component_names(key) or [f"{key}.{index}" for index in range(first[key].shape[1])]
    if not set(angles) <= set(names):
        raise ValueError(
            f"`angles` (--state_angles) must be among {names} in {dataset.name!r}, got {sorted(set(angles) - set(names))}."
        )
    columns = [index for index, name in enumerate(names) if name in angles]
    episodes = {}
    for number in numbers:
        vectors = dataset.vectors(number)
        states = np.concatenate([vectors[key] for key in keys], axis=1)
        if states.shape[1] != len(names):
            raise ValueError(
                f"states must have {len(names)} components, as in episode {numbers[0]} of {dataset.name!r}, got {states.shape[1]} "
                f"in episode {number}: remove the episode, or use other `keys` (--state_keys)."
            )
        radians = states[:, columns]
        episodes[number] = np.concatenate(
            [np.delete(states, columns, axis=1), np.cos(radians), np.sin(radians)], axis=1
        )
    return episodes


class LatentClips(Dataset):
    """Windows of cached latents with the actions between their frames.

    Files are memory-mapped: processes share them, and only the windows that are used are read from disk.

    Args:
        folder: Folder written by `cache_latents`.
        sample_frames: Number F of frames of a window, including the history; at least 2.
        stride: Distance between the first frames of successive windows; 1 in training, 16 in the paper's evaluation.
        states: States (T, S) of episodes by index, which are returned with the windows; see `standardised_states`.
        skip_short: Skip episodes that are shorter than a window, and list their indices in `short`.
        frame_skip: Distance between successive frames of a window, in frames of the cache; see `PreparedEpisodes.all_phases`.

    Raises:
        ValueError: If an argument is out of range, the cache is incomplete or damaged, an episode is shorter than a window and
            `skip_short` is False, all episodes are shorter, or the shapes of latents or actions differ between episodes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        sample_frames: int = 16,
        stride: int = 1,
        states: Mapping[int, torch.Tensor] | None = None,
        skip_short: bool = False,
        frame_skip: int = 1,
    ) -> None:
        counts = {"sample_frames": (sample_frames, 2), "stride": (stride, 1), "frame_skip": (frame_skip, 1)}
        for name, (count, least) in counts.items():
            if count < least:
                raise ValueError(f"`{name}` must be at least {least}, got {count}.")
        self.stride = stride
        self.frame_skip = frame_skip
        self.span = (sample_frames - 1) * frame_skip + 1  # number of frames of a window, including skipped ones
        self.states = states
        self.episodes = _read_episodes(Path(folder))
        lengths = {number: len(latents) for number, (latents, _) in self.episodes.items()}
        self.short = [number for number, length in lengths.items() if length < self.span]
        window = f"window of {sample_frames} frames" + (f" with `frame_skip` {frame_skip}" if frame_skip > 1 else "")
        if len(self.short) == len(lengths):
            raise ValueError(f"no episode of {str(folder)!r} is as long as a {window}: {SHORTER}.")
        if self.short and not skip_short:
            raise ValueError(
                f"episodes of {str(folder)!r} must be at least as long as a {window}, but {len(self.short)} of {len(lengths)} are "
                f"shorter, for example episode {self.short[0]} with {lengths[self.short[0]]} frames: {SHORTER}, or skip these "
                "episodes with `skip_short` (--skip_broken)."
            )
        for number in self.short:
            del self.episodes[number]
        _check_shapes(self.episodes, str(folder))
        self._numbers = list(self.episodes)
        windows = [(lengths[number] - self.span) // stride + 1 for number in self._numbers]
        self._firsts = np.cumsum([0, *windows])  # index of the first window of each episode, and the number of windows

    @property
    def windows(self) -> Iterator[tuple[int, int]]:
        """Episode index and first frame of every window."""
        counts = np.diff(self._firsts).tolist()
        return (
            (number, window * self.stride)
            for number, count in zip(self._numbers, counts, strict=True)
            for window in range(count)
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        latents, _ = next(iter(self.episodes.values()))
        return latents.shape[-2], latents.shape[-1]

    @property
    def actions(self) -> torch.Tensor:
        """Actions (N, A) between the frames of all episodes, concatenated."""
        return torch.cat([actions[: -self.frame_skip] for _, actions in self.episodes.values()])

    def changes(self) -> np.ndarray:
        """Return the change (N,) of every window: the sum of mean absolute differences of successive frames."""
        changes = []
        for latents, _ in self.episodes.values():
            parts = zip(latents[: -self.frame_skip].split(256), latents[self.frame_skip :].split(256), strict=True)
            # the difference of maximum and minimum cannot overflow in uint8
            distances = [torch.maximum(*part).sub_(torch.minimum(*part)) for part in parts]
            steps = [distance.flatten(1).float().mean(1) for distance in distances]
            windows = torch.cat(steps).unfold(0, self.span - self.frame_skip, self.stride)
            changes.append(windows[:, :: self.frame_skip].double().sum(1))
        return torch.cat(changes).numpy()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one window.

        Returns:
            `latents` (C, F, h, w), float32, unscaled, or frames in [-1, 1] if the cache was made without an autoencoder;
            `actions` (F - 1, A), whose row k leads from frame k to frame k + 1; `states` (F, S), if they were given.
        """
        index = range(len(self))[index]
        place = int(np.searchsorted(self._firsts, index, side="right")) - 1
        episode, start = self._numbers[place], (index - int(self._firsts[place])) * self.stride
        latents, actions = self.episodes[episode]
        part = slice(start, start + self.span, self.frame_skip)
        frames = latents[part].float().transpose(0, 1)
        clip = {
            "latents": frames / 127.5 - 1 if latents.dtype == torch.uint8 else frames,
            "actions": actions[part][:-1],
        }
        return clip if self.states is None else clip | {"states": self.states[episode][part]}


def _read_episodes(folder: Path) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return latents (T, C, h, w) and actions (T, A) of all episodes of a complete cache, by index."""
    remedy = "re-run the training, or `cache_latents`, which encodes missing and damaged files"
    try:
        known = read_json_object(folder / "manifest.json").get("files", {})
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} contains no complete latent cache: {remedy}.") from error
    episodes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in sorted({*folder.glob("latents-*.safetensors"), *(folder / name for name in known)}):
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {str(path)!r}: {error}: {remedy}.") from error
        numbers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("latents."))
        episodes |= {number: (tensors[f"latents.{number}"], tensors[f"actions.{number}"]) for number in numbers}
    return episodes


def _check_shapes(episodes: Mapping[int, tuple[torch.Tensor, torch.Tensor]], folder: str) -> None:
    shapes = {number: (tuple(latents.shape[1:]), actions.shape[1]) for number, (latents, actions) in episodes.items()}
    first = next(iter(shapes))
    for number, shape in shapes.items():
        if shape != shapes[first]:
            raise ValueError(
                f"episodes {first} and {number} of {folder!r} have different shapes: latents {shapes[first][0]} and {shape[0]}, "
                f"{shapes[first][1]} and {shape[1]} action components; use episodes with equal frame sizes and action components."
            )


class MixedClips(Dataset):
    """Mixture of several sets of clips in given proportions.

    Args:
        clips: The sets. Their latents, actions and windows must have the same shapes.
        weights: Relative share of each set; None for shares proportional to the numbers of windows. The mixture has as many
            windows as all sets together, up to rounding. Windows of a set are repeated if its share exceeds its size; if the share
            is smaller, each epoch omits different windows.
        seed: Seed that selects the windows, together with the epoch.
        change_share: Fraction of the windows that are drawn with a probability proportional to their change (see
            `LatentClips.changes`). The other windows are drawn uniformly.

    Raises:
        ValueError: If the shapes differ, `weights` are not one positive finite number per set, or `change_share` is not in [0, 1].
    """

    def __init__(
        self,
        clips: Sequence[LatentClips],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        change_share: float = 0.0,
    ) -> None:
        if not 0 <= change_share <= 1:
            raise ValueError(f"`change_share` must be in [0, 1], got {change_share}.")
        if weights is not None:
            shares = np.asarray(weights, dtype=np.float64)
            if shares.shape != (len(clips),) or not (np.isfinite(shares) & (shares > 0)).all():
                raise ValueError(f"`weights` must be {len(clips)} positive finite numbers, got {list(weights)}.")
        shapes = [{name: tuple(value.shape) for name, value in part[0].items()} for part in clips]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"`clips` must have windows of the same shapes, got {shapes}.")
        self.clips = clips
        self.seed = seed
        self.sizes = np.array([len(part) for part in clips])
        self.shares = self.sizes / self.sizes.sum() if weights is None else shares / shares.sum()
        self.change_share = change_share
        self._changes = [part.changes() if change_share else None for part in clips]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Select the windows of an epoch."""
        order = np.random.default_rng([self.seed, epoch])
        drawn = []
        for size, share, changes in zip(self.sizes, self.shares, self._changes, strict=True):
            number = max(round(share * self.sizes.sum()), 1)
            by_change = round(self.change_share * number)
            drawn.append(np.resize(order.permutation(size), number - by_change))
            if by_change:
                weights = np.asarray(changes) + 1e-9  # without any change, all windows are equally likely
                drawn[-1] = np.append(drawn[-1], order.choice(size, by_change, p=weights / weights.sum()))
        self._sets = np.repeat(np.arange(len(drawn), dtype=np.int32), [len(part) for part in drawn])
        self._drawn = np.concatenate(drawn)

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one window; see `LatentClips`."""
        return self.clips[self._sets[index]][int(self._drawn[index])]


def action_normalisation(actions: torch.Tensor, kind: str = "std") -> tuple[list[float], list[float]]:
    """Compute the offset and scale of every action component for a model's config.

    Args:
        actions: Actions (N, A) in raw units.
        kind: `"std"` for zero mean and unit standard deviation. `"quantile"` maps the 1 % and 99 % quantiles to -1 and 1 and
            is robust to outliers.

    Returns:
        Offset and scale per component. The scale is 1 if the standard deviation or half the distance between the quantiles is at
        most 1e-6, for example for a constant component.

    Raises:
        ValueError: If the kind is unknown, or actions are empty or not finite.
    """
    if not (actions.numel() and torch.isfinite(actions).all()):
        found = "NaN or infinity" if actions.numel() else tuple(actions.shape)
        raise ValueError(f"`actions` must be finite numbers (N, A) and not empty, got {found}.")
    values = actions.double()
    if kind == "std":
        offset, spread = values.mean(0), values.std(0, correction=0)
    elif kind == "quantile":
        low, high = (torch.from_numpy(np.quantile(values.numpy(), level, axis=0)) for level in (0.01, 0.99))
        offset, spread = (low + high) / 2, (high - low) / 2
    else:
        raise ValueError(f"`kind` (--action_normalisation) must be std or quantile, got {kind!r}.")
    scale = torch.where(spread > 1e-6, 1 / spread.clamp_min(1e-6), 1.0)
    return offset.tolist(), scale.tolist()
