"""Vector environment with LeRobot's conventions, and `make_env` for LeRobot's EnvHub.

To publish an environment on the Hub, copy this file as `env.py` into the repository.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from irasim_diffusers import embedded_checkpoint
from irasim_diffusers.envs import WorldModelVectorEnv

STATE = "observation.state"


class LeRobotVectorEnv(WorldModelVectorEnv):
    """Vector environment of a world model with the conventions of LeRobot's rollouts.

    Finished rows are frozen, because LeRobot also sums rewards after the end of an episode. Actions are clipped
    to the bounds. Observations also contain the robot state, if it is available, as `observation.state`, the key that recordings
    use.

    Args:
        model: A world model.
        num_envs: Number of rows.
        task: Task description, for policies that read it.
        options: Further arguments of `WorldModelVectorEnv`.
    """

    def __init__(self, model: Any, num_envs: int = 1, task: str = "", **options: Any) -> None:
        defaults: dict[str, Any] = {"autoreset_mode": "Disabled", "clip_actions": True, "render_mode": "rgb_array"}
        super().__init__(model, num_envs, **defaults | options)
        self.task = self.task_description = task
        fps = self.metadata["render_fps"]
        self.metadata["render_fps"] = int(fps) if fps == int(fps) else fps  # LeRobot writes it into `info.json`

    def _observation_spaces(self) -> dict[str, gymnasium.Space]:
        spaces = super()._observation_spaces()
        return spaces | ({STATE: spaces["agent_pos"]} if "agent_pos" in spaces else {})

    def _observation(self) -> dict[str, np.ndarray]:
        observation = super()._observation()
        return observation | ({STATE: observation["agent_pos"].copy()} if "agent_pos" in observation else {})


def make_env(n_envs: int = 1, use_async_envs: bool = False, cfg: Any = None) -> dict[str, dict[int, LeRobotVectorEnv]]:
    """Create the environments; LeRobot's EnvHub calls this function.

    Args:
        n_envs: Number of rows, which are predicted together.
        use_async_envs: Ignored: one process predicts all rows.
        cfg: An `IRASimEnvConfig`, or None for the embedded Push-T model.

    Returns:
        `{"irasim": {0: environments}}`.
    """
    options = {"model": str(embedded_checkpoint())} if cfg is None else cfg.gym_kwargs
    return {"irasim": {0: LeRobotVectorEnv.from_pretrained(num_envs=n_envs, **options)}}
