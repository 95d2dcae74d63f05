"""Predictors: a pipeline, or a folder of saved predictions of any model."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..data import EpisodeSource, first_readable, read_video
from ..files import temporary_path
from ..pipelines import IRASimPipeline
from .protocols import Clip


@dataclass(frozen=True)
class ClipData:
    """A clip with its frames and actions."""

    clip: Clip
    number: int  # its place among the clips, which seeds its noise
    frames: np.ndarray  # (h + n, H, W, 3), uint8
    actions: np.ndarray  # (n, A)
    action_before: np.ndarray  # (A,), that of the frame before; of an episode's first frame its own

    @property
    def history(self) -> np.ndarray:
        """Frames given (h, H, W, 3)."""
        return self.frames[: self.clip.history]

    @property
    def truth(self) -> np.ndarray:
        """Frames to be predicted (n, H, W, 3)."""
        return self.frames[self.clip.history :]


@dataclass(frozen=True)
class Prediction:
    """The predicted future of one clip."""

    frames: np.ndarray  # (n, H, W, 3), uint8
    latents: torch.Tensor | None = None  # (C, n, h, w), scaled, where the model has any
    network_evaluations: float | None = None  # of one window, where known
    autoencoder: str | None = None  # hash of the autoencoder of these latents, where known


class Predictor(Protocol):
    """Interface of predictors."""

    def predict(self, clips: Sequence[ClipData]) -> list[Prediction]:
        """Predict the future frames of clips of equal length."""


class ClipReader:
    """Reads clips from a data set; those of one episode in turn decode it once."""

    def __init__(self, dataset: EpisodeSource, clips: Sequence[Clip]) -> None:
        self.clips = clips
        self.episode = lru_cache(maxsize=1)(dataset.__getitem__)

    def __call__(self, number: int) -> ClipData:
        """Read the clip with this index."""
        clip = self.clips[number]
        episode = self.episode(clip.episode)
        first = clip.start + clip.history - 1  # the action at the last frame seen
        last = first + clip.predicted
        frames, actions = episode.frames[clip.start : last + 1], episode.actions[first:last]
        return ClipData(clip, number, frames, actions, episode.actions[max(first - 1, 0)])


class PipelinePredictor:
    """Predictions of a pipeline; a clip's noise depends on the seed and its number alone.

    Args:
        pipeline: The pipeline.
        num_inference_steps: Denoising steps of a window; None takes the pipeline's own.
        seed: Seed of the noise.
        resize: Resize frames of another size for the model, and its predictions back.
        batch_size: Windows predicted together at most.

    Attributes:
        autoencoder: Hash of the autoencoder, whose latents no other's can be compared with; None in pixel space.
    """

    def __init__(
        self,
        pipeline: IRASimPipeline,
        num_inference_steps: int | None = None,
        seed: int = 0,
        resize: bool = False,
        batch_size: int = 8,
    ) -> None:
        self.pipeline, self.config = pipeline, pipeline.transformer.config
        self.num_inference_steps, self.seed, self.resize = num_inference_steps, seed, resize
        self.batch_size = batch_size
        self._evaluations = 0
        self.autoencoder = None if pipeline.vae is None else _digest([pipeline.vae])
        pipeline.transformer.register_forward_hook(self._count)

    @property
    def setting(self) -> dict[str, Any]:
        """What its figures depend on, JSON-able; weights and configs by their hash."""
        pipeline = self.pipeline
        settings = [_config(pipeline.scheduler), pipeline.config.timesteps]
        return {
            "weights": _digest([pipeline.vae, pipeline.transformer], settings),
            "scheduler": type(pipeline.scheduler).__name__,
            "num_inference_steps": self.num_inference_steps or pipeline.config.num_inference_steps,
            "window_length": pipeline.window_length,
            "resize": self.resize,
        }

    def check_dataset(self, dataset: EpisodeSource) -> None:
        """Check that a data set matches the data the model was trained on.

        Raises:
            ValueError: If the number or derivation of the actions, or the frames a second differ.
        """
        dim = first_readable(dataset, dataset.vectors)["action"].shape[1]
        derivation = getattr(dataset, "action_derivation", "recorded")
        for what, wanted, got, flag in (
            ("action components", self.config.action_dim, dim, "--pad-actions-to"),
            (
                "action derivation",
                self.config.action_derivation,
                derivation,
                "--action-derivation, --action-composition",
            ),
            ("frames a second", self.config.fps or dataset.fps, dataset.fps or self.config.fps, "--frame-skip"),
        ):
            if wanted != got:
                raise ValueError(f"{what} of {dataset.name!r} must be {wanted} as the model's, got {got}: see {flag}.")

    def predict(self, clips: Sequence[ClipData]) -> list[Prediction]:
        """Predict the future frames of clips of equal length."""
        before = self._evaluations
        histories = np.stack([clip.history[-self.config.num_history_frames :] for clip in clips])
        seeds = [self.seed + clip.number for clip in clips]
        latents = self._latents(histories, np.stack([clip.actions for clip in clips]), seeds)
        pixels = (self._decode(latents, clips[0].frames.shape[1:3]) * 255).round().byte()
        frames = pixels.cpu().numpy().transpose(0, 2, 3, 4, 1)  # (B, n, H, W, 3)
        chunks = -(-latents.shape[2] // (self.pipeline.window_length - self.config.num_history_frames))
        evaluations = (self._evaluations - before) / chunks
        kept = [None] * len(frames) if self.autoencoder is None else latents  # frames in [-1, 1] are no latents
        return [Prediction(*pair, evaluations, self.autoencoder) for pair in zip(frames, kept, strict=True)]

    def futures(self, clip: ClipData, sequences: np.ndarray) -> torch.Tensor:
        """Futures (K, n, 3, H, W) in [0, 1] of one clip under actions (K, n, A), all from the same noise."""
        history = clip.history[None, -self.config.num_history_frames :]
        parts = []
        for first in range(0, len(sequences), self.batch_size):
            actions = sequences[first : first + self.batch_size]
            latents = self._latents(history, actions, [self.seed + clip.number] * len(actions))
            parts.append(self._decode(latents, clip.frames.shape[1:3]).transpose(1, 2).cpu())
        return torch.cat(parts)

    def hold(self, clip: ClipData) -> np.ndarray:
        """The action (A,) that asks for no motion after the one before the clip."""
        return self.pipeline.action_space.hold(np.asarray(clip.action_before))

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """Scaled latents (C, T, h, w) of frames (T, H, W, 3), uint8."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.pipeline.encode_history(_resized(pixels, self.pipeline.frame_size)[None])[0].cpu()

    def _latents(self, histories: np.ndarray, actions: np.ndarray, seeds: list[int]) -> torch.Tensor:
        return self.pipeline(
            histories,
            actions,
            num_inference_steps=self.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            resize=self.resize,
        ).frames

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """Pixels (B, 3, n, H, W) in [0, 1] of a size."""
        pixels = (self.pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
        resized = _resized(pixels.transpose(1, 2).flatten(0, 1), size).clamp(0, 1)
        return resized.unflatten(0, (len(pixels), -1)).transpose(1, 2)

    def _count(self, *_: Any) -> None:
        self._evaluations += 1


class FolderPredictor:
    """Predictions in a folder, one file per clip: `<name>.npz` or `<name>.mp4`.

    An npz file holds `frames` (n, H, W, 3), uint8, and may hold `latents` (C, n, h, w), with `autoencoder`, the hash that
    `save_prediction` writes.

    Args:
        folder: The folder.
        resize: Resize predictions of another size than the truth's, instead of refusing them.
        autoencoder: Hash of the autoencoder that encodes the truth: latents that say they are of another one are left out.
    """

    def __init__(self, folder: Path, resize: bool = False, autoencoder: str | None = None) -> None:
        if not folder.is_dir():
            raise ValueError(f"--predictions must be a folder, got {str(folder)!r}.")
        self.folder, self.resize, self.autoencoder = folder, resize, autoencoder

    def path(self, clip: Clip) -> Path:
        """The file of a clip.

        Raises:
            ValueError: If there is none.
        """
        for suffix in (".npz", ".mp4"):
            path = self.folder / (clip.name + suffix)
            if path.is_file():
                return path
        raise ValueError(
            f"`predictions` must hold {clip.name}.npz or {clip.name}.mp4, the {clip.predicted} frames predicted from frame "
            f"{clip.start + clip.history} of episode {clip.episode}; clips.json in the output folder lists all."
        )

    def predict(self, clips: Sequence[ClipData]) -> list[Prediction]:
        """Read the predictions of clips."""
        return [self._read(clip) for clip in clips]

    def _read(self, data: ClipData) -> Prediction:
        path = self.path(data.clip)
        frames, latents, autoencoder = (read_video(path), None, None) if path.suffix == ".mp4" else _read_npz(path)
        if autoencoder is not None and autoencoder != self.autoencoder:
            latents = None
        wanted = data.truth.shape
        if len(frames) != wanted[0] or frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"{str(path)!r} must hold the {wanted[0]} predicted frames (n, H, W, 3), uint8, without the history, got "
                f"{frames.shape}, {frames.dtype}."
            )
        if frames.shape != wanted and not self.resize:
            raise ValueError(
                f"frames of {str(path)!r} must be {wanted[1]}x{wanted[2]} (height x width) as the truth, got "
                f"{frames.shape[1]}x{frames.shape[2]}: pass --resize to resize them."
            )
        if frames.shape != wanted:
            pixels = _resized(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), wanted[1:3])
            frames = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return Prediction(frames, latents, autoencoder=autoencoder)


def _config(part: Any) -> dict[str, Any]:
    """Return the config of a component without private entries such as its path."""
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def _digest(modules: Sequence[torch.nn.Module | None], settings: Any = None) -> str:
    """Hash of modules' weights and configs, and of other settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in modules:
        if module is None:
            continue
        digest.update(json.dumps(_config(module), sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_prediction(folder: Path, clip: Clip, prediction: Prediction) -> None:
    """Write a prediction as `FolderPredictor` reads it, whole or not at all."""
    arrays: dict[str, Any] = {"frames": prediction.frames}
    if prediction.latents is not None:
        arrays["latents"] = prediction.latents.cpu().float().numpy()
        arrays["autoencoder"] = np.array(prediction.autoencoder or "")
    with temporary_path(folder / f"{clip.name}.npz") as partial:
        np.savez_compressed(partial, **arrays)


def _read_npz(path: Path) -> tuple[np.ndarray, torch.Tensor | None, str | None]:
    """Frames, latents and the hash of their autoencoder."""
    try:
        with np.load(path, allow_pickle=False) as file:
            latents = torch.from_numpy(file["latents"]) if "latents" in file else None
            autoencoder = str(file["autoencoder"]) if "autoencoder" in file else None
            return file["frames"], latents, autoencoder or None
    except (ValueError, OSError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} must be an npz file with an array `frames`: {error}") from error


def _resized(pixels: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Pixels (T, 3, H, W) of another size, as the pipeline resizes."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)
