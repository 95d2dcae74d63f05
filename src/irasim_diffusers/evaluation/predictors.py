"""Predictors: a world model, or a folder of saved predictions of any model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..data import EpisodeSource, first_readable, format_cameras, frame_skip_for, read_video
from ..data.content_hash import tensors_hash
from ..files import temporary_path
from ..models import public_config
from ..pictures import resize, resize_video
from ..pipelines import IRASimPipeline
from ..rollout import WorldModel, roll
from .protocols import Clip

logger = logging.getLogger(__name__)

MAX_SIDE = 4096
"""Maximum side of saved predictions in pixels."""
UNREADABLE: tuple[type[Exception], ...] = (
    *(ValueError, OSError, KeyError, EOFError, TypeError, SyntaxError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""Errors that zipfile and NumPy raise for damaged files."""


@dataclass(frozen=True)
class ClipData:
    """Clip with its frames and actions."""

    clip: Clip
    number: int  # index of the clip, which seeds the noise
    frames: np.ndarray  # (h + n, H, W, 3), uint8
    actions: np.ndarray  # (n, A)
    action_before: np.ndarray  # (A,), the previous action; at the start of an episode the first action

    @property
    def history(self) -> np.ndarray:
        """History frames (h, H, W, 3)."""
        return self.frames[: self.clip.history]

    @property
    def truth(self) -> np.ndarray:
        """True future frames (n, H, W, 3)."""
        return self.frames[self.clip.history :]


@dataclass(frozen=True)
class Prediction:
    """Predicted future of one clip."""

    frames: np.ndarray  # (n, H, W, 3), uint8
    latents: torch.Tensor | None = None  # (C, n, h, w), scaled; None if unknown or not comparable
    network_evaluations: float | None = None  # per window, if known
    autoencoder: str | None = None  # hash of the autoencoder of the latents, if known


class Predictor(Protocol):
    """Interface of predictors."""

    def predict(self, clips: Sequence[ClipData]) -> list[Prediction]:
        """Predict the future frames of clips of equal length."""


class ClipReader:
    """Reader of clips from a dataset. An episode is decoded only once for consecutive clips."""

    def __init__(self, dataset: EpisodeSource, clips: Sequence[Clip]) -> None:
        self.clips = clips
        self.episode = lru_cache(maxsize=1)(dataset.__getitem__)

    def __call__(self, number: int) -> ClipData:
        """Read the clip with this index.

        Raises:
            ValueError: If its episode cannot be read.
        """
        clip = self.clips[number]
        episode = self.episode(clip.episode)
        first = clip.start + clip.history - 1  # the action at the last history frame
        last = first + clip.predicted
        frames, actions = episode.frames[clip.start : last + 1], episode.actions[first:last]
        return ClipData(clip, number, frames, actions, episode.actions[max(first - 1, 0)])


class EvaluationCounter:
    """Context manager that counts the forward calls of a model.

    Args:
        model: The denoising network.

    Attributes:
        count: Number of calls of the model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.count, self._model = 0, model

    def __enter__(self) -> EvaluationCounter:
        self._hook = self._model.register_forward_hook(self._add)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()

    def _add(self, *_: Any) -> None:
        self.count += 1


class WorldModelPredictor:
    """Predictor that uses a world model. A clip's noise depends only on the seed and the clip's index.

    Args:
        model: The world model: a pipeline, or any other object with the methods of `rollout.WorldModel`.
        seed: Seed of the noise.
        resize: Resize frames to the size of the model, and predictions to the size of the frames.
        batch_size: Maximum number of action sequences per batch in `futures`.
        chunk_length: Actions per chunk; None for `model.max_chunk`.
    """

    autoencoder: str | None = None  # hash of the autoencoder; None if the model has no comparable latents

    def __init__(
        self,
        model: WorldModel,
        seed: int = 0,
        resize: bool = False,
        batch_size: int = 8,
        chunk_length: int | None = None,
    ) -> None:
        self.model, self.seed, self.resize, self.batch_size = model, seed, resize, batch_size
        self.chunk_length = model.max_chunk if chunk_length is None else chunk_length

    @property
    def setting(self) -> dict[str, Any]:
        """JSON-serializable entries for `Evaluation.setting`, without the seed and the weights."""
        return {"chunk_length": self.chunk_length, "resize": self.resize}

    def check_dataset(self, dataset: EpisodeSource) -> None:
        """Check that a dataset matches the data that the model was trained on; other cameras cause a warning.

        Raises:
            ValueError: If the number of action components, their derivation or the known frame rates differ, or no episode can be
                read.
        """
        dim = first_readable(dataset, dataset.vectors)["action"].shape[1]
        derivation = getattr(dataset, "action_derivation", "recorded")
        space = self.model.action_space
        fps = self.model.fps or dataset.fps
        padding = "--pad-actions-to" if dim < len(space) else "a dataset or model with the same actions"
        derived = "--action-derivation or --action-composition"
        if space.derivation == "recorded":
            derived = "recorded actions, or a dataset or model with the same actions"
        try:  # the flag replaces the current frame skip
            skipping = f"--frame-skip {getattr(dataset, 'frame_skip', 1) * frame_skip_for(dataset.fps, fps or 0)}"
        except ValueError:  # frames can be skipped only if the ratio is an integer
            skipping = "a dataset or model with the same frame rate"
        for name, wanted, found, flags in (
            ("action components", len(space), dim, padding),
            ("action derivation", space.derivation, derivation, derived),
            ("frames per second", fps, dataset.fps or fps, skipping),
        ):
            if wanted != found:
                raise ValueError(
                    f"{name} of {dataset.name!r} must be {wanted} like the model's, got {found}: use {flags}."
                )
        trained = getattr(self.model, "cameras", None)
        if trained and [list(row) for row in trained] != [list(row) for row in dataset.cameras]:
            logger.warning(  # no error, since the names of one camera differ between dataset formats
                f"The model was trained on the cameras {format_cameras(trained)}, but the evaluation uses "
                f"{format_cameras(dataset.cameras)} of {dataset.name!r}."
            )

    def check_clip(self, clip: ClipData) -> None:
        """Check that the model can predict a clip.

        Raises:
            ValueError: If frames do not have the model's size and `resize` is False, or actions are invalid.
        """
        size, found = tuple(self.model.frame_size), clip.frames.shape[1:3]
        if found != size and not self.resize:
            raise ValueError(
                f"frames must be {size[0]}x{size[1]} (height x width) like the model's, got {found[0]}x{found[1]}: pass "
                "resize=True (--resize on the command line) to resize them."
            )
        self.model.action_space.prepare(clip.actions)

    def predict(self, clips: Sequence[ClipData]) -> list[Prediction]:
        """Predict the future frames of clips of equal length.

        Raises:
            ValueError: If the model cannot predict one of the clips; see `check_clip`.
        """
        for clip in clips:
            self.check_clip(clip)
        histories = np.stack([self.history(clip) for clip in clips])
        actions = np.stack([clip.actions for clip in clips])
        latents = self._roll(histories, actions, [self.seed + clip.number for clip in clips])
        pixels = (self._decode(latents, clips[0].frames.shape[1:3]) * 255).round().byte()
        frames = pixels.cpu().numpy().transpose(0, 1, 3, 4, 2)  # (B, n, H, W, 3)
        kept = [None] * len(frames) if self.autoencoder is None else latents
        return [Prediction(*pair, autoencoder=self.autoencoder) for pair in zip(frames, kept, strict=True)]

    def futures(self, clip: ClipData, sequences: np.ndarray) -> torch.Tensor:
        """Predict futures (K, n, 3, H, W) in [0, 1] of a clip for actions (K, n, A), from the same noise."""
        parts = []
        for first in range(0, len(sequences), self.batch_size):
            actions = sequences[first : first + self.batch_size]
            latents = self._roll(self.history(clip)[None], actions, [self.seed + clip.number] * len(actions))
            parts.append(self._decode(latents, clip.frames.shape[1:3]).cpu())
        return torch.cat(parts)

    def history(self, clip: ClipData) -> np.ndarray:
        """Return the history frames (h, H, W, 3) of a clip that the model receives."""
        return clip.history

    def hold(self, clip: ClipData) -> np.ndarray:
        """Return the hold action (A,) for the start of the clip."""
        return self.model.action_space.hold(np.asarray(clip.action_before))

    def sampling(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return the keyword arguments of the model's `advance` for rollouts with these seeds."""
        return {}

    @torch.no_grad()
    def _roll(self, histories: np.ndarray, actions: np.ndarray, seeds: list[int]) -> torch.Tensor:
        """Predict latents (B, C, n, h, w) for histories (B or 1, h, H, W, 3), uint8, and actions (B, n, A)."""
        pixels = torch.from_numpy(np.ascontiguousarray(histories)).permute(0, 1, 4, 2, 3).float() / 255
        size = tuple(self.model.frame_size)
        pixels = resize(pixels, size).clamp(0, 1)
        space = self.model.action_space
        given = space.prepare(actions)
        missing = -given.shape[1] % self.chunk_length  # whole chunks, as in training
        padded = torch.cat([given, space.hold(given[:, -1:]).expand(-1, missing, -1)], dim=1)
        state = self.model.start(pixels, seeds)
        chunks = [latents for _, latents in roll(self.model, state, padded, self.chunk_length, **self.sampling(seeds))]
        return torch.cat(chunks, dim=2)[:, :, : given.shape[1]]

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """Decode latents (B, C, n, h, w) to frames (B, n, 3, H, W) in [0, 1] of the given size."""
        return resize(self.model.decode(latents), size).clamp(0, 1)


class PipelinePredictor(WorldModelPredictor):
    """Predictor that uses a pipeline; the noise of each clip has its own seeded generator.

    Args:
        pipeline: The pipeline. Its `chunk_length` is used.
        num_inference_steps: Denoising steps per chunk; None for the default of the pipeline.
        seed: See `WorldModelPredictor`.
        resize: See `WorldModelPredictor`.
        batch_size: See `WorldModelPredictor`.
    """

    def __init__(
        self,
        pipeline: IRASimPipeline,
        num_inference_steps: int | None = None,
        seed: int = 0,
        resize: bool = False,
        batch_size: int = 8,
    ) -> None:
        config = pipeline.transformer.config
        super().__init__(pipeline, seed, resize, batch_size, pipeline.chunk_length)
        self.pipeline, self.config, self.num_inference_steps = pipeline, config, num_inference_steps
        self.autoencoder = None if pipeline.vae is None else weights_hash([pipeline.vae])

    @property
    def setting(self) -> dict[str, Any]:
        """JSON-serializable entries for `Evaluation.setting`, with a hash of the weights and without the seed."""
        pipeline = self.pipeline
        return {
            "weights": pipeline_hash(pipeline),
            "scheduler": type(pipeline.scheduler).__name__,
            "num_inference_steps": self.num_inference_steps or pipeline.config.num_inference_steps,
            "chunk_length": pipeline.chunk_length,
            "resize": self.resize,
        }

    def predict(self, clips: Sequence[ClipData]) -> list[Prediction]:
        """Predict the future frames of clips of equal length, and count the network evaluations per window."""
        with EvaluationCounter(self.pipeline.transformer) as counter:
            predictions = super().predict(clips)
        chunks = -(-len(clips[0].actions) // self.chunk_length)
        evaluations = counter.count / chunks
        return [replace(prediction, network_evaluations=evaluations) for prediction in predictions]

    def history(self, clip: ClipData) -> np.ndarray:
        """Return the last history frames (h, H, W, 3) of a clip, at most as many as the checkpoint takes."""
        return clip.history[-self.config.num_history_frames :]

    def sampling(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return the number of denoising steps and one seeded generator per rollout."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {"num_inference_steps": self.num_inference_steps, "generator": generators}

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """Resize frames (T, H, W, 3), uint8, to the model's size; encode them to scaled latents (C, T, h, w)."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.pipeline.encode_history(resize(pixels, self.pipeline.frame_size)[None])[0].cpu()


class FolderPredictor:
    """Predictions in a folder, one file per clip: `<name>.npz` or `<name>.mp4`.

    An npz file contains `frames` (n, H, W, 3), uint8, and optionally `latents` (C, n, h, w) with `autoencoder`, the hash
    that `save_prediction` writes.

    Args:
        folder: The folder.
        resize: Resize predictions to the size of the true frames instead of raising an error.
        autoencoder: Hash of the autoencoder that encodes the true frames. Latents with another hash are ignored.

    Raises:
        ValueError: If `folder` is not a folder.
    """

    def __init__(self, folder: Path, resize: bool = False, autoencoder: str | None = None) -> None:
        if not folder.is_dir():
            raise ValueError(f"`predictions` must be a folder, got {str(folder)!r}.")
        self.folder, self.resize, self.autoencoder = folder, resize, autoencoder

    def path(self, clip: Clip) -> Path:
        """Return the file of a clip.

        Raises:
            ValueError: If the file is missing.
        """
        for suffix in (".npz", ".mp4"):
            path = self.folder / (clip.name + suffix)
            if path.is_file():
                return path
        raise ValueError(
            f"`predictions` must contain {clip.name}.npz or {clip.name}.mp4, with {clip.predicted} frames from frame "
            f"{clip.start + clip.history} of episode {clip.episode}: files are named <episode>-<first frame of the clip>, "
            "each with 6 digits."
        )

    def predict(self, clips: Sequence[ClipData]) -> list[Prediction]:
        """Read the predictions of clips.

        Raises:
            ValueError: If a file is missing, damaged, or does not match its clip.
        """
        return [self._read(clip) for clip in clips]

    def _read(self, data: ClipData) -> Prediction:
        path, wanted = self.path(data.clip), data.truth.shape
        shape, kind = _npz_header(path, data) if path.suffix == ".npz" else (None, np.dtype(np.uint8))
        frames, latents, autoencoder = None, None, None
        if shape is None:
            frames = read_video(path)
            shape = frames.shape
        if (
            len(shape) != 4
            or shape[0] != wanted[0]
            or shape[-1] != 3
            or kind != np.uint8
            or not 0 < min(shape[1:]) <= max(shape[1:]) <= MAX_SIDE
        ):
            raise ValueError(
                f"{str(path)!r} must contain the {wanted[0]} predicted frames (n, H, W, 3), uint8, without the history, got "
                f"{shape}, {kind}; sides must have 1 to {MAX_SIDE} pixels."
            )
        if shape != wanted and not self.resize:
            raise ValueError(
                f"frames of {str(path)!r} must be {wanted[1]}x{wanted[2]} (height x width) like the true frames, got "
                f"{shape[1]}x{shape[2]}: pass resize=True (--resize on the command line) to resize them."
            )
        if frames is None:
            frames, latents, autoencoder = _read_npz(path)
        if autoencoder is not None and autoencoder != self.autoencoder:
            latents = None
        if shape != wanted:
            frames = resize_video(frames, wanted[1:3])
        return Prediction(frames, latents, autoencoder=autoencoder)


def pipeline_hash(pipeline: IRASimPipeline) -> str:
    """Return a hash of a pipeline's weights, the configs of its models and scheduler, and its timesteps."""
    settings = [public_config(pipeline.scheduler.config), pipeline.config.timesteps]
    return weights_hash([pipeline.vae, pipeline.transformer], settings)


def weights_hash(modules: Sequence[Any], settings: Any = None) -> str:
    """Return a hash of the weights and configs of models, and of other settings; None entries are skipped."""
    models = [module for module in modules if module is not None]
    parts = [[public_config(each.config), tensors_hash(each.state_dict(), torch.float32)] for each in models]
    return hashlib.sha256(json.dumps([settings, parts], sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_prediction(folder: Path, clip: Clip, prediction: Prediction) -> None:
    """Write a prediction in the format of `FolderPredictor`; the file is either complete or absent."""
    arrays: dict[str, Any] = {"frames": prediction.frames}
    if prediction.latents is not None:
        arrays["latents"] = prediction.latents.cpu().float().numpy()
        arrays["autoencoder"] = np.array(prediction.autoencoder or "")
    with temporary_path(folder / f"{clip.name}.npz") as partial:
        np.savez_compressed(partial, **arrays)


def _npz_header(path: Path, data: ClipData) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and type of `frames`, and check the other arrays, before the values are read."""
    try:
        with zipfile.ZipFile(path) as file:
            found = {name: _array_header(file, name) for name in file.namelist()}
    except UNREADABLE as error:
        raise ValueError(f"{str(path)!r} must be an npz file with an array `frames`: {error}") from error
    if "frames.npy" not in found:
        raise ValueError(f"{str(path)!r} must be an npz file with an array `frames`, got {sorted(found)[:8]}.")
    others = {  # latents have fewer values than the frames, and a hash has at most 64 characters
        "latents.npy": (8 * data.truth.size, "f", "floating-point numbers"),
        "autoencoder.npy": (256, "U", "text"),
    }
    for name in others.keys() & found.keys():
        (limit, code, wanted), (shape, kind) = others[name], found[name]
        if kind.kind != code or math.prod(shape) * kind.itemsize > limit:
            raise ValueError(
                f"`{name.removesuffix('.npy')}` in {str(path)!r} must be {wanted} of at most {limit} bytes, got shape {shape} "
                f"and type {kind}."
            )
    return found["frames.npy"]


def _array_header(file: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    with file.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(member)
    return shape, kind


def _read_npz(path: Path) -> tuple[np.ndarray, torch.Tensor | None, str | None]:
    """Read frames, latents and the hash of their autoencoder."""
    try:
        with np.load(path, allow_pickle=False) as file:
            latents = torch.from_numpy(file["latents"]) if "latents" in file else None
            autoencoder = str(file["autoencoder"]) if "autoencoder" in file else None
            frames = file["frames"]
    except UNREADABLE as error:
        raise ValueError(f"{str(path)!r} must be an npz file with undamaged arrays: {error}") from error
    if latents is not None and not torch.isfinite(latents).all():
        raise ValueError(f"`latents` in {str(path)!r} must be finite, got NaN or infinity.")
    return frames, latents, autoencoder or None
