"""LeRobot's configuration of the environment type `irasim`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium

try:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.envs.configs import EnvConfig
except ImportError as error:
    raise ImportError(
        "`irasim_diffusers.lerobot.config` requires LeRobot: pip install 'lerobot[evaluation]>=0.6'"
    ) from error

from irasim_diffusers import embedded_checkpoint
from irasim_diffusers.data import open_dataset
from irasim_diffusers.envs import EpisodeStarts, import_callable

from .env import STATE, LeRobotVectorEnv, make_env


@EnvConfig.register_subclass("irasim")
@dataclass
class IRASimEnvConfig(EnvConfig):
    """Configuration of environments that are backed by a world model.

    The features are read from the model when the environments are created.

    Args:
        task: Task description, for policies that read it.
        fps: Frames per second; replaced by those of the model when the environments are created.
        model: Folder or Hub id of a pipeline; the embedded Push-T model by default.
        dataset: Folder or Hub id of a LeRobotDataset; episodes start from the first frames of the episodes in its split `train`.
            None for the starts that are stored with the model.
        num_history_frames: Number of history frames of a start from `dataset`.
        state_key: Key of the robot state in `dataset`, for actions that are motions derived from states; None for no states.
        episode_length: Steps after which an episode is truncated.
        reward: Reward of the frames as `module:name`, a callable (B, n, 3, H, W) -> (B, n), or a class that is called without
            arguments to create one. None for the reward that is stored with the model.
        success: Success function as `module:name`, a callable (B, n, 3, H, W) -> bool (B, n), or a class that is called without
            arguments to create one. None for the success function that is stored with the model.
        num_inference_steps: Denoising steps per frame; None for the checkpoint's setting.
        device: Device of the world model; None for CUDA if available, else the CPU.
    """

    task: str | None = ""
    fps: int = 10
    model: str = ""
    dataset: str | None = None
    num_history_frames: int = 1
    state_key: str | None = None
    episode_length: int = 300
    reward: str | None = None
    success: str | None = None
    num_inference_steps: int | None = None
    device: str | None = None

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `LeRobotVectorEnv.from_pretrained`."""
        options: dict[str, Any] = {
            "model": self.model or str(embedded_checkpoint()),
            "device": self.device,
            "task": self.task or "",
            "max_episode_steps": self.episode_length,
        }
        for name in ("reward", "success"):
            if getattr(self, name) is not None:
                found = import_callable(f"`{name}`", getattr(self, name))
                options[name] = found() if isinstance(found, type) else found
        if self.num_inference_steps is not None:
            options["sampling"] = {"num_inference_steps": self.num_inference_steps}
        if self.dataset is not None:
            options["starts"] = EpisodeStarts(
                open_dataset(self.dataset), self.num_history_frames, state_key=self.state_key
            )
        return options

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
        """Create the environments and read the features; `use_async_envs` is ignored."""
        environments = make_env(n_envs, use_async_envs, self)
        self._read_features(environments[self.type][0])
        return environments  # type: ignore[return-value]

    def _read_features(self, environment: LeRobotVectorEnv) -> None:
        spaces = environment.single_observation_space.spaces  # type: ignore[attr-defined]
        shapes = {"observation.image": (FeatureType.VISUAL, spaces["pixels"].shape)}
        if STATE in spaces:
            shapes[STATE] = (FeatureType.STATE, spaces[STATE].shape)
        shapes["action"] = (FeatureType.ACTION, environment.single_action_space.shape)
        self.features = {key: PolicyFeature(type=kind, shape=tuple(shape)) for key, (kind, shape) in shapes.items()}
        self.features_map = {key: key for key in shapes}
        self.fps = environment.metadata["render_fps"]
