"""Clips for training: latents encoded once, windows cut from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..files import temporary_path
from .episode import EpisodeSource

EPISODES_PER_FILE = 50


def cache_latents(
    dataset: EpisodeSource,
    vae: AutoencoderKL,
    cache_dir: str | os.PathLike,
    *,
    batch_size: int = 40,
    mixed_precision: bool = False,
    skip_broken: bool = False,
    recorded: bool = False,
) -> Path:
    """Encode every frame of a data set once; an interrupted run goes on with the first file missing.

    Args:
        dataset: The data set.
        vae: The frozen autoencoder, on the device that shall encode.
        cache_dir: Where the latents go, under a folder named by data set, camera and autoencoder.
        batch_size: Frames encoded at a time.
        mixed_precision: Encode under bfloat16 autocast.
        skip_broken: Leave out episodes that cannot be read, and list them in the manifest, instead of stopping at one.
        recorded: Take the latents that lie beside the videos (`IRASimFolder`), made by the same autoencoder and scaled.

    Returns:
        The folder of latents: safetensors files with `latents.<episode>` (T, C, h, w), float16, unscaled, and
        `actions.<episode>` (T, A), float32, for 50 episodes each, and once complete `manifest.json`, which holds the
        number of `episodes` and what is `broken`.

    Raises:
        ValueError: If an episode is broken, unless it shall be skipped; names file and episode.
    """
    identity = json.loads(json.dumps({"data": dataset.identity, "vae": _fingerprint(vae), "recorded": recorded}))
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{Path(dataset.name).name}-{digest}"
    manifest = folder / "manifest.json"
    if manifest.is_file():
        return folder

    def encode(number: int) -> tuple[torch.Tensor, np.ndarray]:
        if not recorded:
            episode = dataset[number]
            return _encode(vae, episode.frames, batch_size, mixed_precision), episode.actions
        latents = dataset.latents(number) if hasattr(dataset, "latents") else None
        if latents is None:
            raise ValueError(f"episode {number} of {dataset.name!r} has no latents beside its video.")
        unscaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return unscaled.half(), dataset.vectors(number)["action"]

    broken: dict[int, str] = {}
    with tqdm(total=len(dataset), desc="encoding latents", unit="episode") as bar:
        for first in range(0, len(dataset), EPISODES_PER_FILE):
            numbers = range(first, min(first + EPISODES_PER_FILE, len(dataset)))
            file = folder / f"latents-{first // EPISODES_PER_FILE:05d}.safetensors"
            errors = file.with_suffix(".broken.json")
            if not file.is_file():
                tensors, failed = _encode_episodes(dataset, numbers, encode, skip_broken, bar)
                with temporary_path(errors) as partial:
                    partial.write_text(json.dumps(failed))
                with temporary_path(file) as partial:
                    save_file(tensors, partial)
            bar.update(numbers[-1] + 1 - bar.n)
            broken |= json.loads(errors.read_text())
    with temporary_path(manifest) as partial:
        partial.write_text(json.dumps(identity | {"episodes": len(dataset), "broken": broken}, indent=2))
    return folder


def _encode_episodes(
    dataset: EpisodeSource,
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


def standardised_states(dataset: EpisodeSource, keys: Sequence[str], angles: Sequence[str] = ()) -> list[torch.Tensor]:
    """States of every episode (T, S), float32, each component of zero mean and unit variance over the data set.

    Args:
        dataset: The data set.
        keys: Vector features that make up the state.
        angles: Names of components in radians, which become a cosine and a sine.

    Raises:
        ValueError: If a feature or component does not exist.
    """
    first = dataset.vectors(0)
    names: list[str] = []
    for key in keys:
        if key not in first:
            raise ValueError(f"{dataset.name!r} has no vector feature {key!r}; it has {sorted(first)}.")
        names += dataset.component_names(key) or [f"{key}.{index}" for index in range(first[key].shape[1])]
    if not set(angles) <= set(names):
        raise ValueError(f"{dataset.name!r} has no components {sorted(set(angles) - set(names))} among {names}.")
    columns = [index for index, name in enumerate(names) if name in angles]
    episodes = []
    for number in range(len(dataset)):
        vectors = dataset.vectors(number)
        states = np.concatenate([vectors[key] for key in keys], axis=1)
        turned = states[:, columns]
        episodes.append(np.concatenate([np.delete(states, columns, axis=1), np.cos(turned), np.sin(turned)], axis=1))
    pooled = np.concatenate(episodes)
    mean, deviation = pooled.mean(0), np.maximum(pooled.std(0), 1e-6)
    return [torch.from_numpy((states - mean) / deviation) for states in episodes]


def action_statistics(dataset: EpisodeSource) -> dict[str, list[float]]:
    """Mean, deviation and the 1 % and 99 % quantiles of every component of the actions, over all episodes."""
    actions = np.concatenate([dataset.vectors(number)["action"] for number in range(len(dataset))]).astype(np.float64)
    q01, q99 = np.quantile(actions, [0.01, 0.99], axis=0)
    parts = {"mean": actions.mean(0), "std": actions.std(0), "q01": q01, "q99": q99}
    return {name: values.tolist() for name, values in parts.items()}


@torch.no_grad()
def _encode(vae: AutoencoderKL, frames: np.ndarray, batch_size: int, mixed_precision: bool) -> torch.Tensor:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    latents = []
    for batch in pixels.split(batch_size):
        batch = batch.to(vae.device).to(vae.dtype) / 127.5 - 1
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=mixed_precision):
            latents.append(vae.encode(batch).latent_dist.mode().to("cpu", torch.float16))
    return torch.cat(latents).contiguous()


def _fingerprint(vae: AutoencoderKL) -> str:
    """Hash of the configuration that shapes latents, and of every weight."""
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
        states: States (T, S) of each episode of the data set, to go with its windows; see `standardised_states`.

    Raises:
        ValueError: If the folder is incomplete, or no episode is as long as a window.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        sample_frames: int = 16,
        stride: int = 1,
        states: Sequence[torch.Tensor] | None = None,
    ) -> None:
        folder = Path(folder)
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{str(folder)!r} holds no complete set of latents; make it with `cache_latents`.")
        self.sample_frames = sample_frames
        self.states = states
        self.episodes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for path in sorted(folder.glob("latents-*.safetensors")):
            tensors = load_file(path)
            numbers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("latents."))
            self.episodes |= {
                number: (tensors[f"latents.{number}"], tensors[f"actions.{number}"]) for number in numbers
            }
        self.windows = [
            (number, start)
            for number, (latents, _) in self.episodes.items()
            for start in range(0, len(latents) - sample_frames + 1, stride)
        ]
        if not self.windows:
            raise ValueError(
                f"no episode of {str(folder)!r} is as long as a window of {sample_frames} frames; train with fewer "
                "frames."
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window.

        Returns:
            `latents` (C, F, h, w), float32, unscaled; `actions` (F - 1, A), row k leading from frame k to frame k + 1;
            where there are any, `states` (F, S).
        """
        episode, start = self.windows[index]
        latents, actions = self.episodes[episode]
        last = start + self.sample_frames
        clip = {"latents": latents[start:last].float().transpose(0, 1), "actions": actions[start : last - 1]}
        return clip if self.states is None else clip | {"states": self.states[episode][start:last]}


class MixedClips(Dataset):
    """Several sets of clips as one, each with its share.

    Args:
        clips: The sets.
        weights: Share of each in the whole, in any unit; None for as many as they have. The whole is as long as all sets
            together; a set whose share is larger than it repeats its windows, one whose share is smaller leaves some out.
        seed: Chooses the windows that are left out or repeated once more.
    """

    def __init__(self, clips: Sequence[LatentClips], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        if weights is not None and (len(weights) != len(clips) or min(weights) <= 0):
            raise ValueError(f"`weights` must be {len(clips)} positive numbers, got {list(weights)}.")
        self.clips = clips
        sizes = np.array([len(part) for part in clips])
        shares = sizes / sizes.sum() if weights is None else np.asarray(weights) / np.sum(weights)
        order = np.random.default_rng(seed)
        self.windows = [
            (number, int(window))
            for number, (size, share) in enumerate(zip(sizes, shares, strict=True))
            for window in np.resize(order.permutation(size), round(share * sizes.sum()))
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window; see `LatentClips`."""
        number, window = self.windows[index]
        return self.clips[number][window]
