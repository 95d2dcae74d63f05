"""Clips for training: latents encoded once, windows cut from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..files import temporary_path
from .lerobot import LeRobotFolder

EPISODES_PER_FILE = 50


def cache_latents(
    dataset: LeRobotFolder,
    vae: AutoencoderKL,
    cache_dir: str | os.PathLike,
    *,
    batch_size: int = 40,
    mixed_precision: bool = False,
) -> Path:
    """Encode every frame of a data set once; an interrupted run goes on with the first file missing.

    Args:
        dataset: The data set.
        vae: The frozen autoencoder, on the device that shall encode.
        cache_dir: Where the latents go, under a folder named by data set, camera and autoencoder.
        batch_size: Frames encoded at a time.
        mixed_precision: Encode under bfloat16 autocast.

    Returns:
        The folder of latents: safetensors files with `latents.<episode>` (T, C, h, w), float16, unscaled, and
        `actions.<episode>` (T, A), float32, for 50 episodes each, and `manifest.json` once complete.
    """
    identity = {
        "dataset": str(dataset.root.resolve()),
        "camera": dataset.camera,
        "info": dataset.info,
        "episodes": len(dataset),
        "vae": _fingerprint(vae),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{dataset.root.resolve().name}-{digest}"
    manifest = folder / "manifest.json"
    if manifest.is_file():
        return folder

    def file(number: int) -> Path:
        return folder / f"latents-{number // EPISODES_PER_FILE:05d}.safetensors"

    done = next((k for k in range(0, len(dataset), EPISODES_PER_FILE) if not file(k).is_file()), len(dataset))
    tensors: dict[str, torch.Tensor] = {}
    bar = tqdm(dataset.episodes(done), total=len(dataset), initial=done, desc="encoding latents", unit="episode")
    for number, episode in enumerate(bar, done):
        tensors[f"latents.{number}"] = _encode(vae, episode.frames, batch_size, mixed_precision)
        tensors[f"actions.{number}"] = torch.from_numpy(np.ascontiguousarray(episode.actions))
        if (number + 1) % EPISODES_PER_FILE == 0 or number + 1 == len(dataset):
            with temporary_path(file(number)) as partial:
                save_file(tensors, partial)
            tensors = {}
    with temporary_path(manifest) as partial:
        partial.write_text(json.dumps(identity, indent=2))
    return folder


def standardised_states(dataset: LeRobotFolder, keys: Sequence[str], angles: Sequence[str] = ()) -> list[torch.Tensor]:
    """States of every episode (T, S), float32, each component of zero mean and unit variance over the data set.

    Args:
        dataset: The data set.
        keys: Vector features that make up the state.
        angles: Names of components in radians, which become a cosine and a sine.

    Raises:
        ValueError: If a feature or component does not exist.
    """
    features = dataset.info["features"]
    names: list[str] = []
    for key in keys:
        if key not in features or features[key]["dtype"] != "float32":
            raise ValueError(f"{str(dataset.root)!r} has no vector feature {key!r}; it has {sorted(features)}.")
        names += features[key]["names"] or [f"{key}.{index}" for index in range(features[key]["shape"][0])]
    if not set(angles) <= set(names):
        raise ValueError(f"{str(dataset.root)!r} has no components {sorted(set(angles) - set(names))} among {names}.")
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
        states: States (T, S) of each episode, to go with its windows; see `standardised_states`.

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
        self.episodes: list[tuple[torch.Tensor, torch.Tensor]] = []
        for path in sorted(folder.glob("latents-*.safetensors")):
            tensors = load_file(path)
            numbers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("latents."))
            self.episodes += [(tensors[f"latents.{number}"], tensors[f"actions.{number}"]) for number in numbers]
        self.episodes = self.episodes[: json.loads(manifest.read_text())["episodes"]]
        self.windows = [
            (episode, start)
            for episode, (latents, _) in enumerate(self.episodes)
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
