"""An exact linear world model for tests of planners and policies."""

from dataclasses import dataclass

import torch

from irasim_diffusers import RolloutState
from irasim_diffusers.action_space import ActionSpace

SPACE = ActionSpace(
    names=("x", "y"),
    units=(None, None),
    low=(-0.125, -0.25),
    high=(0.25, 0.25),
    scale=(10.0, -8.0),  # a negative scale exchanges the bounds
    offset=(0.0, 0.0),
)


@dataclass
class PointWorld:
    """Exact linear world model: an action moves a point; noise of the seed is added to each position.

    Latents are positions (B, 2, n, 1, 1). Frames are (3, 2, 4): red is x, green is y.
    """

    noise: float = 0.0
    gain: float = 1.0
    max_chunk: int = 4
    fps: float | None = None
    action_space: ActionSpace = SPACE
    frame_size = (2, 4)
    decoded = 0
    largest = 0

    def start(self, frames, seeds):
        frames = torch.as_tensor(frames)
        frames = frames.movedim(-1, -3) / 255 if frames.dtype == torch.uint8 else frames
        # one history per seed, or one for all seeds
        histories = frames if frames.ndim == 5 else frames.reshape(1, -1, 3, 2, 4)
        position = histories[:, -1, :2, 0, 0]
        return RolloutState.first(position[:, :, None, None, None].expand(len(seeds), -1, 1, 1, 1), seeds)

    def advance(self, state, actions):
        self.largest = max(self.largest, len(state))
        if self.action_space.kind == "absolute":
            future = actions.transpose(1, 2)
        else:
            future = state.latents[:, :, -1, 0, 0, None] + self.gain * actions.cumsum(1).transpose(1, 2)
        noise = [
            torch.stack([torch.randn(2, generator=source) for source in state.generators(index)])
            for index in range(actions.shape[1])
        ]
        future = (future + self.noise * torch.stack(noise, dim=2))[..., None, None]
        return state.append(future, 1), future

    def decode(self, latents):
        self.decoded += latents.shape[0] * latents.shape[2]
        frames = latents.transpose(1, 2).expand(-1, -1, -1, 2, 4)
        return torch.cat([frames, torch.full_like(frames[:, :, :1], 0.5)], dim=2)


def image(x, y):
    return torch.tensor([x, y, 0.5])[:, None, None].expand(3, 2, 4)
