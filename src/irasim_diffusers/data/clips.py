"""Clips for training: latents encoded once, windows cut from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..files import temporary_path
from ..latents import unscale_latents
from .episode import Episode, EpisodeSource

FRAMES_AT_ONCE = 256
"""How many frames of an episode are decoded before they are encoded; more costs memory, fewer costs seeking."""


def cache_latents(
    dataset: EpisodeSource,
    vae: AutoencoderKL | None,
    cache_dir: str | os.PathLike,
    *,
    batch_size: int = 40,
    mixed_precision: bool = False,
    skip_broken: bool = False,
    recorded: bool = False,
    episodes_per_file: int = 50,
    process_index: int = 0,
    num_processes: int = 1,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> Path:
    """Encode every frame of a data set once; an interrupted run goes on with the files missing.

    Args:
        dataset: The data set.
        vae: The frozen autoencoder, on the device that encodes; None caches the frames as uint8 for pixel-space models.
        cache_dir: Where the latents go, under a folder named by data set, camera and autoencoder.
        batch_size: Frames encoded at a time.
        mixed_precision: Encode under bfloat16 autocast.
        skip_broken: Leave out episodes that cannot be read, and list them in the manifest, instead of stopping at one.
        recorded: Take the latents that lie beside the videos (`IRASimFolder`), made by the same autoencoder and scaled.
        episodes_per_file: Episodes in each file, the unit of work that is shared, and redone after an interruption.
        process_index: Number of this process among those that encode together, each its share of the files.
        num_processes: How many they are.
        wait_for_everyone: Returns when all of them have called it.

    Returns:
        The folder of latents: safetensors files with `latents.<episode>` (T, C, h, w), float16 and unscaled, or uint8 without
        an autoencoder, and `actions.<episode>` (T, A), float32, and once complete `manifest.json`, which holds the number of
        `episodes`, what is `broken`, the `autoencoder` and the `dtype` of the latents.

    Raises:
        ValueError: If an episode is broken, unless it shall be skipped, also where an earlier run skipped it; names file
            and episode. If no episode can be read. If `recorded` is given without an autoencoder.
    """
    if vae is None and recorded:
        raise ValueError("`recorded` must be False without `vae`: recorded latents need their autoencoder.")
    scale = vae.config.scaling_factor if vae is not None and recorded else None
    identity = json.loads(
        json.dumps(
            {
                "data": dataset.identity,
                "vae": None if vae is None else _fingerprint(vae),
                "recorded": scale,
                "mixed_precision": mixed_precision and not recorded and vae is not None,
                "episodes_per_file": episodes_per_file,
            }
        )
    )
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{Path(dataset.name).name}-{digest}"
    manifest = folder / "manifest.json"
    if manifest.is_file():
        return _checked(folder, skip_broken)

    def encode(number: int) -> tuple[torch.Tensor, np.ndarray]:
        if not recorded:
            parts = [
                (_encode(vae, part.frames, batch_size, mixed_precision), part.actions)
                for part in _parts(dataset, number, batch_size)
            ]
            return torch.cat([latents for latents, _ in parts]), np.concatenate([actions for _, actions in parts])
        latents = dataset.latents(number) if hasattr(dataset, "latents") else None
        if latents is None or vae is None:
            raise ValueError(f"episode {number} of {dataset.name!r} has no latents beside its video.")
        return unscale_latents(vae, latents).half(), dataset.vectors(number)["action"]

    starts = range(0, len(dataset), episodes_per_file)
    files = {start: folder / f"latents-{start // episodes_per_file:05d}.safetensors" for start in starts}
    shares = np.array_split(starts, num_processes)  # neighbours, which lie in the same files
    share = shares[process_index].tolist()
    total = sum(min(start + episodes_per_file, len(dataset)) - start for start in share)
    with tqdm(total=total, desc="encoding latents", unit="episode", disable=process_index > 0) as bar:
        for start in share:
            numbers = range(start, min(start + episodes_per_file, len(dataset)))
            if files[start].is_file():
                bar.update(len(numbers))
                continue
            tensors, failed = _encode_episodes(numbers, encode, skip_broken, bar)
            with temporary_path(files[start].with_suffix(".broken.json")) as partial:
                partial.write_text(json.dumps(failed))
            with temporary_path(files[start]) as partial:
                save_file(tensors, partial)
    wait_for_everyone()
    if process_index == 0:
        failures = [json.loads(file.with_suffix(".broken.json").read_text()) for file in files.values()]
        broken = {number: error for failed in failures for number, error in failed.items()}
        autoencoder = None if vae is None else str(vae.config.get("_name_or_path") or type(vae).__name__)
        dtype = "uint8" if vae is None else "float16"
        content = {"episodes": len(dataset), "broken": broken, "autoencoder": autoencoder, "dtype": dtype}
        with temporary_path(manifest) as partial:
            partial.write_text(json.dumps(identity | content, indent=2))
        _remove_leftovers(folder)
    wait_for_everyone()
    return _checked(folder, skip_broken)


def _parts(dataset: EpisodeSource, number: int, batch_size: int) -> Iterator[Episode]:
    """An episode, in whole batches if it is long, since its frames may be large before they are resized."""
    length, size = len(dataset.vectors(number)["action"]), max(FRAMES_AT_ONCE // batch_size, 1) * batch_size
    if length <= size:
        yield dataset[number]
    else:
        for start in range(0, length, size):
            yield dataset.window(number, start, min(size, length - start))


def _remove_leftovers(folder: Path) -> None:
    """Delete the half-written files of encoders that were killed; those of another run that is alive stay."""
    for partial in folder.glob(".*.partial*"):
        if not psutil.pid_exists(int(partial.name.split(".")[-3])):
            partial.unlink(missing_ok=True)


def _checked(folder: Path, skip_broken: bool) -> Path:
    """A complete folder, if it holds something and all, or what is missing may be."""
    content = json.loads((folder / "manifest.json").read_text())
    broken = content["broken"]
    if len(broken) == content["episodes"]:
        raise ValueError(f"no episode can be read; the first: {next(iter(broken.values()), 'there is none')}")
    if broken and not skip_broken:
        raise ValueError(
            f"{len(broken)} episodes were skipped as broken, the first: {next(iter(broken.values()))} Skip them again, or "
            f"mend them and delete {str(folder)!r}."
        )
    return folder


def _encode_episodes(
    numbers: range,
    encode: Callable[[int], tuple[torch.Tensor, np.ndarray]],
    skip_broken: bool,
    bar: tqdm,
) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """Latents and actions of some episodes, and what is wrong with the rest."""
    tensors: dict[str, torch.Tensor] = {}
    failed: dict[int, str] = {}
    for number in numbers:
        try:
            latents, actions = encode(number)
        except ValueError as error:
            if not skip_broken:
                raise
            failed[number] = str(error)
            bar.write(f"skipped: {error}")
        else:
            tensors[f"latents.{number}"] = latents
            tensors[f"actions.{number}"] = torch.from_numpy(np.ascontiguousarray(actions))
        bar.update()
    return tensors, failed


def standardised_states(
    datasets: Sequence[EpisodeSource],
    keys: Sequence[str],
    angles: Sequence[str] = (),
    numbers: Sequence[Iterable[int]] | None = None,
) -> list[dict[int, torch.Tensor]]:
    """States (T, S) of episodes by number, float32, each component of zero mean and unit variance over all data sets.

    A component that never changes becomes zero.

    Args:
        datasets: The data sets.
        keys: Vector features that make up the state.
        angles: Names of components in radians, which become a cosine and a sine.
        numbers: The episodes of each data set; None for all.

    Returns:
        For each data set, states by number of the episode.

    Raises:
        ValueError: If a feature or component does not exist, or a state is not finite.
    """
    chosen = [list(part) for part in numbers] if numbers else [list(range(len(dataset))) for dataset in datasets]
    parts = [episode_states(dataset, keys, angles, part) for dataset, part in zip(datasets, chosen, strict=True)]
    pooled = np.concatenate([states for part in parts for states in part.values()], dtype=np.float64)
    mean, deviation = pooled.mean(0), pooled.std(0)
    deviation = np.where(deviation > 1e-6, deviation, 1)
    return [
        {number: torch.from_numpy((states - mean) / deviation).float() for number, states in part.items()}
        for part in parts
    ]


def episode_states(
    dataset: EpisodeSource, keys: Sequence[str], angles: Sequence[str], numbers: Iterable[int]
) -> dict[int, np.ndarray]:
    """States (T, S) of some episodes by number, in raw units.

    Args:
        dataset: The data set.
        keys: Vector features that make up the state, one after the other.
        angles: Names of components in radians, which become a cosine and a sine at the end.
        numbers: The episodes.

    Raises:
        ValueError: If a feature or component does not exist, or a state is not finite.
    """
    numbers = list(numbers)
    first = dataset.vectors(numbers[0])
    names: list[str] = []
    for key in keys:
        if key not in first:
            raise ValueError(f"{dataset.name!r} has no vector feature {key!r}; it has {sorted(first)}.")
        names += dataset.component_names(key) or [f"{key}.{index}" for index in range(first[key].shape[1])]
    if not set(angles) <= set(names):
        raise ValueError(f"{dataset.name!r} has no components {sorted(set(angles) - set(names))} among {names}.")
    columns = [index for index, name in enumerate(names) if name in angles]
    episodes = {}
    for number in numbers:
        vectors = dataset.vectors(number)
        for key in keys:
            if not np.isfinite(vectors[key]).all():
                frame = int(np.nonzero(~np.isfinite(vectors[key]).all(axis=1))[0][0])
                raise ValueError(
                    f"episode {number} of {dataset.name!r}: {key!r} at frame {frame} is {vectors[key][frame].tolist()}: mend "
                    "the recording, or leave the episode out."
                )
        states = np.concatenate([vectors[key] for key in keys], axis=1)
        turned = states[:, columns]
        episodes[number] = np.concatenate([np.delete(states, columns, axis=1), np.cos(turned), np.sin(turned)], axis=1)
    return episodes


@torch.no_grad()
def _encode(vae: AutoencoderKL | None, frames: np.ndarray, batch_size: int, mixed_precision: bool) -> torch.Tensor:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if vae is None:
        return pixels.contiguous()
    latents = []
    for batch in pixels.split(batch_size):
        batch = batch.to(vae.device).to(vae.dtype) / 127.5 - 1
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=mixed_precision):
            latents.append(vae.encode(batch).latent_dist.mode().to("cpu", torch.float16))
    return torch.cat(latents).contiguous()


def _fingerprint(vae: AutoencoderKL) -> str:
    """Hash of every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class LatentClips(Dataset):
    """Windows of cached latents with the actions between their frames.

    Args:
        folder: Folder made by `cache_latents`.
        sample_frames: Frames F of a window, history and predicted.
        stride: Distance between the starts of windows; 1 in training, 16 in the paper's evaluation.
        frame_skip: Distance between the frames of a window, where all were encoded; see `PreparedEpisodes.all_phases`.
        states: States (T, S) of episodes by number, to go with their windows; see `standardised_states`.
        skip_short: Leave out episodes that are shorter than a window, and list their numbers in `short`.

    Raises:
        ValueError: If the folder is incomplete, an episode is shorter than a window, unless it shall be skipped, or all are,
            or episodes differ in the size of their latents or the number of their actions.
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
        folder = Path(folder)
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{str(folder)!r} holds no complete set of latents; make it with `cache_latents`.")
        self.frame_skip = frame_skip
        self.span = (sample_frames - 1) * frame_skip + 1  # from the first frame of a window to its last
        self.states = states
        self.episodes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for path in sorted(folder.glob("latents-*.safetensors")):
            tensors = load_file(path)
            numbers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("latents."))
            self.episodes |= {
                number: (tensors[f"latents.{number}"], tensors[f"actions.{number}"]) for number in numbers
            }
        lengths = {number: len(latents) for number, (latents, _) in self.episodes.items()}
        self.short = [number for number, length in lengths.items() if length < self.span]
        window = f"window of {sample_frames} frames" + (f", every {frame_skip}th" if frame_skip > 1 else "")
        if len(self.short) == len(lengths):
            raise ValueError(f"no episode of {str(folder)!r} is as long as a {window}; train with fewer frames.")
        if self.short and not skip_short:
            raise ValueError(
                f"{len(self.short)} episodes of {str(folder)!r} are shorter than a {window}, the first "
                f"number {self.short[0]} with {lengths[self.short[0]]}; train with fewer frames, or leave them out "
                "with `skip_short` (`--skip_broken`)."
            )
        for number in self.short:
            del self.episodes[number]
        shapes = {
            number: (latents.shape[1:], actions.shape[1]) for number, (latents, actions) in self.episodes.items()
        }
        first = next(iter(shapes))
        for number, shape in shapes.items():
            if shape != shapes[first]:
                raise ValueError(
                    f"episode {number} of {str(folder)!r} has latents {tuple(shape[0])} and {shape[1]} actions, episode "
                    f"{first} {tuple(shapes[first][0])} and {shapes[first][1]}: all must have the same."
                )
        self.stride = stride
        self._numbers = list(self.episodes)
        counts = [(lengths[number] - self.span) // stride + 1 for number in self._numbers]
        self._firsts = np.cumsum([0, *counts])  # the first window of each episode, and how many there are

    @property
    def windows(self) -> Iterator[tuple[int, int]]:
        """Number of the episode and first frame of every window."""
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
        """Actions (N, A) between the frames of all episodes, one after the other."""
        return torch.cat([actions[: -self.frame_skip] for _, actions in self.episodes.values()])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window.

        Returns:
            `latents` (C, F, h, w), float32, unscaled, or frames in [-1, 1] without an autoencoder; `actions` (F - 1, A),
            row k leading from frame k to frame k + 1;
            where there are any, `states` (F, S).
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


class MixedClips(Dataset):
    """Several sets of clips as one, each with its share.

    Args:
        clips: The sets, of one latent size and action space.
        weights: Share of each in the whole, in any unit; None for as many as they have. The whole is as long as all sets
            together; a set whose share is larger than it repeats windows, one whose share is smaller leaves some out, others
            in every epoch.
        seed: Chooses them, with the epoch.

    Raises:
        ValueError: If the sets do not fit together, or a weight is missing or not positive.
    """

    def __init__(self, clips: Sequence[LatentClips], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        if weights is not None and (len(weights) != len(clips) or min(weights) <= 0):
            raise ValueError(f"`weights` must be {len(clips)} positive numbers, got {list(weights)}.")
        shapes = [{name: value.shape for name, value in part[0].items()} for part in clips]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"the sets do not fit together: their windows are {shapes}.")
        self.clips = clips
        self.seed = seed
        self.sizes = np.array([len(part) for part in clips])
        self.shares = self.sizes / self.sizes.sum() if weights is None else np.asarray(weights) / np.sum(weights)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the windows of an epoch."""
        order = np.random.default_rng([self.seed, epoch])
        drawn = [
            np.resize(order.permutation(size), max(round(share * self.sizes.sum()), 1))
            for size, share in zip(self.sizes, self.shares, strict=True)
        ]
        self._sets = np.repeat(np.arange(len(drawn), dtype=np.int32), [len(part) for part in drawn])
        self._drawn = np.concatenate(drawn)

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window; see `LatentClips`."""
        return self.clips[self._sets[index]][int(self._drawn[index])]


def action_normalisation(actions: torch.Tensor, kind: str = "std") -> tuple[list[float], list[float]]:
    """Offset and scale of every component for a model's config.

    Args:
        actions: Actions (N, A) in raw units.
        kind: `"std"` for zero mean and unit deviation; `"quantile"` to bring the 1 % and 99 % quantiles to -1 and 1, which
            outliers do not stretch.

    Returns:
        Offset and scale; the scale of a component that never changes is 1.

    Raises:
        ValueError: If the kind is unknown.
    """
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
