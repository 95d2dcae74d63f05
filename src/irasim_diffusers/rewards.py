"""Rewards: functions that score predicted frames, for environments and planners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional

from .pictures import resize
from .rollout import WorldModel

MAX_SIZE = 8192
"""Maximum value of each size in a config, which bounds the memory that a file can request."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Reward(Protocol):
    """Interface of functions that score each frame; higher is better.

    Any callable with this signature is a reward. A reward that scores latents (B, C, n, h, w) instead of frames has
    the attribute `needs_pixels = False`. A reward that works only for frames of one size has the attribute
    `frame_size`.
    """

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Score frames (B, n, 3, H, W) in [0, 1]; return (B, n)."""
        ...


class GoalImage:
    """Similarity to a goal image: negative MSE, or cosine similarity of features (paper, appendix 12).

    Args:
        goal: RGB image: a PIL image, an array (H, W, 3) or a tensor (3, H, W), uint8 or in [0, 1].
        encoder: Function from frames (N, 3, H, W) in [0, 1] to features (N, ...), such as `pretrained_encoder(...)` or
            `FrameRegressor.features`. None for the MSE.

    Raises:
        ValueError: If the goal is not one RGB image, its values are not finite or not in [0, 1], or its features are not finite.
    """

    needs_pixels = True

    def __init__(self, goal: Any, encoder: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.goal = _image(goal)
        self.encoder = encoder
        self.frame_size = (self.goal.shape[-2], self.goal.shape[-1])
        with torch.no_grad():
            self._features = None if encoder is None else encoder(self.goal[None]).flatten(1)
        if self._features is not None and not torch.isfinite(self._features).all():
            raise ValueError("`encoder` must return finite features, got NaN or infinity for the goal image.")

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Score frames (B, n, 3, H, W); return (B, n), at most 0 for the MSE and at most 1 for the cosine.

        Raises:
            ValueError: If the frames and the goal differ in size.
        """
        if tuple(frames.shape[-3:]) != tuple(self.goal.shape):
            raise ValueError(
                f"`frames` must be (B, n, {', '.join(map(str, self.goal.shape))}), the size of the goal image, got "
                f"{tuple(frames.shape)}: resize the goal image."
            )
        if self.encoder is None or self._features is None:
            return -(frames - self.goal.to(frames)).square().mean(dim=(-3, -2, -1))
        features = self.encoder(frames.flatten(0, 1)).flatten(1)
        cosine = functional.cosine_similarity(features, self._features.to(features), dim=1)
        return cosine.unflatten(0, frames.shape[:2])


class GoalLatents:
    """Negative MSE between predicted latents and the latents of a goal image; no frame is decoded.

    This reward is for planners only: environments pass frames.

    Args:
        model: The world model, which encodes the goal.
        goal: The goal image in any form that `model.start` accepts.
    """

    needs_pixels = False

    @torch.no_grad()
    def __init__(self, model: WorldModel, goal: Any) -> None:
        self.latents = model.start(goal, [0]).latents[:, :, -1:]  # (1, C, 1, h, w)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Score latents (B, C, n, h, w); return (B, n)."""
        return -(latents - self.latents.to(latents)).square().mean(dim=(1, 3, 4))


class FrameRegressor(ModelMixin, ConfigMixin):
    """Convolutional network that predicts a score in [0, 1], such as an IoU, from one frame.

    The model is a differentiable reward, and is saved with `save_pretrained` like any model of diffusers.

    Args:
        sample_height: Height of the frames in pixels.
        sample_width: Width of the frames in pixels.
        channels: Channels of the stem, which divides the resolution by 4, and of the stages, which halve it.
        feature_dim: Number of features before the output layer.
        target: Name of the score (metadata only).
        success_threshold: Minimum score at which a frame counts as a success; None if no success is defined.

    Raises:
        ValueError: If `channels` is not a non-empty list, a size is not a positive integer or is too large, the frames are too
            small for the number of stages, or the threshold is not finite.
    """

    needs_pixels = True

    @register_to_config
    def __init__(
        self,
        sample_height: int = 96,
        sample_width: int = 96,
        channels: Sequence[int] = (32, 48, 64),
        feature_dim: int = 48,
        target: str = "iou",
        success_threshold: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(channels, list | tuple) or not channels or not all(_is_count(each) for each in channels):
            raise ValueError(f"`channels` must be a non-empty list of integers in [1, {MAX_SIZE}], got {channels!r}.")
        if not (_is_count(feature_dim) and _is_count(sample_height) and _is_count(sample_width)):
            raise ValueError(
                f"`feature_dim`, `sample_height` and `sample_width` must be integers in [1, {MAX_SIZE}], got "
                f"{feature_dim!r}, {sample_height!r} and {sample_width!r}."
            )
        threshold = success_threshold
        if threshold is not None and not (type(threshold) in (int, float) and math.isfinite(threshold)):
            raise ValueError(f"`success_threshold` must be a finite number or None, got {threshold!r}.")
        shrink = 2 ** (len(channels) + 1)
        if min(sample_height, sample_width) < shrink:
            raise ValueError(
                f"`sample_height` and `sample_width` must be at least {shrink} for {len(channels)} entries in `channels`, got "
                f"{sample_height} and {sample_width}: use fewer entries."
            )
        self.stem = nn.Conv2d(3, channels[0], 6, stride=4, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(math.gcd(after, 8), after),
                nn.SiLU(),
                nn.Conv2d(after, after, 3, padding=1),
            )
            for before, after in pairwise(channels)
        )
        rows, columns = (math.ceil((size // 4) / 2 ** (len(channels) - 1)) for size in (sample_height, sample_width))
        self.project = nn.Linear(channels[-1] * rows * columns, feature_dim)
        self.out = nn.Linear(feature_dim, 1)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.config.sample_height, self.config.sample_width

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the features (..., feature_dim) of frames (..., 3, H, W) in [0, 1].

        Raises:
            ValueError: If the size of the frames is not `frame_size`.
        """
        if tuple(frames.shape[-3:]) != (3, *self.frame_size):
            raise ValueError(
                f"`frames` must be (..., 3, {self.frame_size[0]}, {self.frame_size[1]}) for this regressor, got "
                f"{tuple(frames.shape)}."
            )
        hidden = self.stem(frames.reshape(-1, *frames.shape[-3:]).to(self.device, self.dtype) * 2 - 1)
        for stage in self.stages:
            hidden = stage(hidden)
        return functional.silu(self.project(functional.silu(hidden).flatten(1))).reshape(*frames.shape[:-3], -1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the scores (...) in [0, 1] of frames (..., 3, H, W) in [0, 1]; see `features` for the errors."""
        return torch.sigmoid(self.out(self.features(frames)).float()).squeeze(-1)

    def success(self, frames: torch.Tensor) -> torch.Tensor:
        """Return whether each of the frames (..., 3, H, W) in [0, 1] is a success: (...), bool.

        Raises:
            ValueError: If the regressor has no `success_threshold`, or the size of the frames is not `frame_size`.
        """
        if self.config.success_threshold is None:
            raise ValueError(
                "`success_threshold` of this regressor must be a score, got None: pass it to the constructor."
            )
        return self(frames) >= self.config.success_threshold


class LeRobotReward:
    """Adapter for LeRobot reward models that score single observations.

    Args:
        model: A `lerobot.rewards` model with `compute_reward(batch) -> (B,)`, or `predict_reward` in older versions.
        camera: Key of the image in the batch.
        preprocessor: Preprocessor of the reward model, which normalizes the batch; optional.
        extra: Other entries of the batch, the same for every frame, such as `{"task": "push the block"}`. Tensors are
            expanded to the batch; other values are repeated.

    Raises:
        ValueError: If the model has neither method.
    """

    needs_pixels = True

    def __init__(
        self,
        model: Any,
        camera: str = "observation.image",
        preprocessor: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        method = getattr(model, "compute_reward", None) or getattr(model, "predict_reward", None)
        if method is None:
            raise ValueError(
                f"`model` must have `compute_reward(batch)`, like reward models of LeRobot, got {type(model).__name__}."
            )
        self.compute, self.camera, self.preprocessor, self.extra = method, camera, preprocessor, extra or {}

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Score frames (B, n, 3, H, W); return (B, n)."""
        count = frames.shape[0] * frames.shape[1]
        batch: dict[str, Any] = {self.camera: frames.flatten(0, 1)}
        for key, value in self.extra.items():
            batch[key] = value.expand(count, *value.shape) if torch.is_tensor(value) else [value] * count
        if self.preprocessor is not None:
            batch = self.preprocessor(batch)
        return torch.as_tensor(self.compute(batch)).float().reshape(frames.shape[:2])


def pretrained_encoder(
    name_or_path: str, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load a vision model of transformers, such as `microsoft/resnet-50`, as the encoder of a `GoalImage`.

    Frames are resized to 224x224 and normalized. Gradients flow to the frames.

    Args:
        name_or_path: Hub id or folder of a model whose output has `pooler_output`.
        mean: Mean of each RGB channel for the normalization, `image_mean` of the model's image processor.
        std: Standard deviation of each RGB channel for the normalization, `image_std` of the model's image processor.

    Returns:
        A function from frames (N, 3, H, W) in [0, 1] to pooled features (N, D).
    """
    from transformers import AutoModel

    network = AutoModel.from_pretrained(name_or_path).eval().requires_grad_(False)

    def encode(frames: torch.Tensor) -> torch.Tensor:
        pixels = resize(frames.to(network.device), (224, 224))
        center, spread = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
        return network(pixel_values=(pixels - center) / spread).pooler_output.flatten(1)

    return encode


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_SIZE


def _image(goal: Any) -> torch.Tensor:
    """Convert one RGB image of any accepted form to (3, H, W), float32 in [0, 1]."""
    if torch.is_tensor(goal):
        pixels = goal.detach().clone()
    else:
        array = np.asarray(goal)
        if array.ndim != 3:
            raise ValueError(f"`goal` must be an RGB image (H, W, 3), got an array of shape {array.shape}.")
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"`goal` must be one RGB image, uint8 or floats in [0, 1], got {pixels.dtype} {tuple(pixels.shape)} (channels "
            "first): convert the image with `image.convert('RGB')`, or integers to uint8."
        )
    if not torch.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(
            f"`goal` must be finite and in [0, 1], got values in [{pixels.min():g}, {pixels.max():g}]: divide 8-bit values by 255."
        )
    return pixels.float()
