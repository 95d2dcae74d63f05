"""A compact diffusion policy for Push-T: from a frame and the pusher's position to a chunk of targets.

A convolutional encoder finds keypoints of the block in the frame (spatial softmax). A residual network denoises the
chunk of targets, relative to the pusher, with a diffusers scheduler. The policy is saved and loaded like any diffusers
model.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from simulator import ARENA
from torch import nn
from torch.nn import functional

SCALE = 100.0  # arena units per unit of a normalized target
NUM_KEYPOINTS = 4
HORIZON = 16  # targets in a chunk
NUM_FREQUENCIES = 6  # number of sine and cosine frequencies per coordinate


class ResidualBlock(nn.Module):
    """Two-layer residual block with scale and shift from a condition."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition_dim, 2 * width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        nn.init.zeros_(self.second.weight)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Apply the block to (B, width) with a condition (B, condition_dim)."""
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return hidden + self.second(functional.silu(self.first(self.norm(hidden) * (1 + scale) + shift)))


class KeypointEncoder(nn.Module):
    """Convolutional network that finds keypoints in a frame, as the means of heat maps."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 6, stride=4, padding=1)]
        for before, after in pairwise(channels):
            layers += [nn.SiLU(), nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after)]
        for dilation in (1, 2, 1):
            layers += [nn.SiLU(), nn.Conv2d(channels[-1], channels[-1], 3, padding=dilation, dilation=dilation)]
            layers += [nn.GroupNorm(8, channels[-1])]
        layers += [nn.SiLU(), nn.Conv2d(channels[-1], 4 * NUM_KEYPOINTS, 3, padding=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Find keypoints (B, K, 2), in arena units, in frames (B, 3, 96, 96) in [0, 1]."""
        maps = self.layers(frames * 2 - 1)
        weights = maps.flatten(2).softmax(-1).unflatten(2, maps.shape[2:])
        centers = (torch.arange(maps.shape[-1], device=maps.device) + 0.5) * (ARENA / maps.shape[-1])
        return torch.stack([weights.sum(2) @ centers, weights.sum(3) @ centers], dim=-1)


class DiffusionPolicy(ModelMixin, ConfigMixin):
    """Diffusion policy that predicts chunks of targets from a frame and the pusher's position.

    Args:
        horizon: Number of targets in a chunk.
        channels: Channels of the encoder's stages; the first divides the resolution by 4, the others halve it.
        width: Width of the denoiser.
        num_blocks: Number of residual blocks of the denoiser.
        condition_dim: Size of the encoded observation.
        num_train_timesteps: Number of timesteps of the noise process.
    """

    @register_to_config
    def __init__(
        self,
        horizon: int = HORIZON,
        channels: Sequence[int] = (32, 64),
        width: int = 256,
        num_blocks: int = 4,
        condition_dim: int = 256,
        num_train_timesteps: int = 100,
    ) -> None:
        super().__init__()
        self.encoder = KeypointEncoder(channels)
        num_features = 2 * NUM_FREQUENCIES * 2 * (1 + 2 * NUM_KEYPOINTS)
        layers = nn.Linear(num_features, condition_dim), nn.SiLU(), nn.Linear(condition_dim, condition_dim)
        self.observation = nn.Sequential(*layers)
        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(64, condition_dim)
        self.proj_in = nn.Linear(2 * horizon, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, condition_dim) for _ in range(num_blocks))
        self.proj_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * horizon))

    def encode(self, frames: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Encode frames (B, 3, 96, 96) in [0, 1] and pusher positions (B, 2) in arena units.

        Returns (B, condition_dim).
        """
        return self.embed(self.encoder(frames), positions)

    def embed(self, keypoints: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embed keypoints (B, K, 2) and pusher positions (B, 2), in arena units, as (B, condition_dim)."""
        centered = torch.cat([positions[:, None], keypoints], dim=1) - ARENA / 2
        points = torch.cat([centered, keypoints - positions[:, None]], dim=1) / ARENA  # (B, 1 + 2 K, 2)
        angles = points[..., None] * torch.pi * 2.0 ** torch.arange(NUM_FREQUENCIES, device=points.device)
        return self.observation(torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        """Predict clean chunks (B, n, 2), normalized.

        Args:
            sample: Noisy chunks (B, n, 2), normalized.
            timestep: Timesteps (B,).
            observation: Encoded observations (B, condition_dim).
        """
        condition = functional.silu(observation + self.time_embedding(self.time_proj(timestep)))
        hidden = self.proj_in(sample.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.proj_out(hidden).unflatten(1, (-1, 2))

    def scheduler(self) -> DDIMScheduler:
        """Create the scheduler that adds noise in training and removes it in sampling."""
        return DDIMScheduler(
            self.config.num_train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            clip_sample=False,
            timestep_spacing="trailing",
        )

    @torch.no_grad()
    def sample(
        self,
        observation: Mapping[str, Any],
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 10,
    ) -> torch.Tensor:
        """Sample chunks of targets.

        Args:
            observation: `pixels` (B, 96, 96, 3), uint8, and `agent_pos` (B, 2), arena units.
            num_samples: Number of chunks per observation.
            generator: Source of the noise.
            num_inference_steps: Number of denoising steps.

        Returns:
            Targets (B, num_samples, n, 2) in arena units, within the arena.
        """
        frames = torch.as_tensor(observation["pixels"]).movedim(-1, 1).float() / 255
        positions = torch.as_tensor(observation["agent_pos"]).float()
        encoded = self.encode(frames, positions).repeat_interleave(num_samples, dim=0)
        scheduler = self.scheduler()
        scheduler.set_timesteps(num_inference_steps)
        chunks = torch.randn(len(encoded), self.config.horizon, 2, generator=generator)
        for timestep in scheduler.timesteps:
            predicted = self(chunks, timestep.expand(len(chunks)), encoded)
            chunks = scheduler.step(predicted, timestep, chunks).prev_sample
        targets = chunks.unflatten(0, (-1, num_samples)) * SCALE + positions[:, None, None]
        return targets.clamp(0, ARENA)
