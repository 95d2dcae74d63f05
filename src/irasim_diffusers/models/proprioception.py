"""A small network that reads the robot state from a frame."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class ProprioceptionModel(ModelMixin, ConfigMixin):
    """Regresses the robot state, such as the position of a gripper, from one frame.

    Convolutions and a spatial softmax locate keypoints (https://arxiv.org/abs/1509.06113). The sum of a linear layer and a
    perceptron maps the keypoints to the state. A world model predicts frames only. If actions are target positions, the state
    after a step cannot be computed from the action, because the robot may not have reached the target. This model reads the
    state from the predicted frame.

    Args:
        state_names: Names of the S state components.
        state_low: Lowest value of each component; `read` clamps states to these bounds.
        state_high: Highest value of each component.
        state_offset: Subtracted from a state before scaling, like `action_offset`.
        state_scale: `normalized = (state - state_offset) * state_scale`.
        block_out_channels: Channels of the convolutions. The first two convolutions have stride 2.
        num_keypoints: Number of keypoints.
        hidden_dim: Width of the perceptron's hidden layer.

    Raises:
        ValueError: If a list of state properties does not have one entry per state component.
    """

    @register_to_config
    def __init__(
        self,
        state_names: list[str],
        state_low: list[float],
        state_high: list[float],
        state_offset: list[float],
        state_scale: list[float],
        block_out_channels: list[int] = [16, 24, 24],  # noqa: B006 (diffusers' configs are plain lists)
        num_keypoints: int = 16,
        hidden_dim: int = 64,
    ) -> None:
        super().__init__()
        size = len(state_names)
        for name in ("state_low", "state_high", "state_offset", "state_scale"):
            if len(self.config[name]) != size:
                raise ValueError(
                    f"`{name}` must have {size} entries, one per state component, got {len(self.config[name])}."
                )
        layers: list[nn.Module] = []
        for index, (channels, following) in enumerate(zip([3, *block_out_channels], block_out_channels, strict=False)):
            kernel, stride = 3 if index else 5, 2 if index < 2 else 1
            layers += [nn.Conv2d(channels, following, kernel, stride, kernel // 2), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(block_out_channels[-1], num_keypoints, 1))
        self.linear = nn.Linear(2 * num_keypoints, size)
        self.perceptron = nn.Sequential(
            nn.Linear(2 * num_keypoints, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, size)
        )

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Read the states.

        Args:
            frames: Frames (B, 3, H, W) in [0, 1].

        Returns:
            States (B, S) in raw units, float32, not limited to the bounds.
        """
        heat = 10 * self.convolutions(2 * frames.to(self.dtype) - 1).float()  # (B, K, H / 4, W / 4)
        shares = heat.flatten(2).softmax(-1).unflatten(-1, heat.shape[-2:])
        rows, columns = (torch.linspace(-1, 1, size, device=heat.device) for size in heat.shape[-2:])
        keypoints = torch.cat([shares.sum(2) @ columns, shares.sum(3) @ rows], dim=1).to(self.dtype)  # (B, 2 K)
        normalized = (self.linear(keypoints) + self.perceptron(keypoints)).float()
        scale, offset = (normalized.new_tensor(self.config[name]) for name in ("state_scale", "state_offset"))
        return normalized / scale + offset

    @torch.no_grad()
    def read(self, frames: torch.Tensor) -> torch.Tensor:
        """Read the states (B, S) of frames (B, 3, H, W) in [0, 1], limited to the bounds, on the CPU."""
        states = self(frames.to(self.device)).cpu()
        return states.clamp(states.new_tensor(self.config.state_low), states.new_tensor(self.config.state_high))
