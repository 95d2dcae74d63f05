"""The Push-T simulator as a world model, an upper bound for planners: its predictions are exact."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from simulator import FPS, SIZE, Simulator

from irasim_diffusers.action_space import ActionSpace
from irasim_diffusers.rollout import RolloutState


class SimulatorModel:
    """A `WorldModel` whose latents are physical states (B, 10, n, 1, 1) of the simulator.

    Rollouts start from the state of `real` instead of frames, because frames do not show velocities.

    Args:
        real: The simulator in which the plans are executed.
        action_space: Action space of the compared world models, so that planners use the same units.
    """

    frame_size = (SIZE, SIZE)
    fps = float(FPS)
    max_chunk = 300

    def __init__(self, real: Simulator, action_space: ActionSpace) -> None:
        self.real, self.action_space = real, action_space
        self._copy = Simulator()
        self._copy.reset(0)

    def start(self, frames: Any, seeds: Sequence[int]) -> RolloutState:
        """Start one rollout per seed from the current state of `real`."""
        physics = torch.from_numpy(self.real.physics())
        return RolloutState.first(physics.view(1, -1, 1, 1, 1).repeat(len(seeds), 1, 1, 1, 1), seeds)

    def advance(
        self, state: RolloutState, actions: torch.Tensor, **sampling: Any
    ) -> tuple[RolloutState, torch.Tensor]:
        """Simulate actions (B, n, 2); return the state after them, and the physical states (B, 10, n, 1, 1)."""
        rows = []
        for physics, row in zip(state.latents[:, :, -1, 0, 0].numpy(), actions.double().numpy(), strict=True):
            self._copy.restore(physics)
            after = []
            for action in row:
                self._copy.step(action)
                after.append(self._copy.physics())
            rows.append(np.stack(after, axis=1))
        future = torch.from_numpy(np.stack(rows))[..., None, None]
        return state.append(future, 1), future

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Render physical states (B, 10, n, 1, 1) as frames (B, n, 3, 96, 96) in [0, 1]."""
        rows = []
        for row in latents[..., 0, 0].numpy():
            for physics in row.T:
                self._copy.restore(physics)
                rows.append(self._copy.frame())
        frames = torch.from_numpy(np.stack(rows)).movedim(-1, -3).float() / 255
        return frames.unflatten(0, (latents.shape[0], latents.shape[2]))
