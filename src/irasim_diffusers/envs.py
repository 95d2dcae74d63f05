"""Gymnasium environments of a world model: `irasim/PushT-v0` and `irasim/WorldModel-v0`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from . import embedded_checkpoint
from .actions import integrate_actions
from .models import ProprioceptionModel
from .pretrained import import_callable, load_world_model
from .rollout import RolloutState, WorldModel, concatenate
from .starts import EpisodeStarts, Start

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError("`irasim_diffusers.envs` requires Gymnasium: pip install gymnasium") from error

__all__ = ["EpisodeStarts", "Start", "WorldModelEnv", "WorldModelVectorEnv", "import_callable", "load_world_model"]

FrameFunction = Callable[[torch.Tensor], torch.Tensor]
"""Maps frames (B, n, 3, H, W) in [0, 1] to one value per frame (B, n)."""

COMPOSED = ("relative_planar", "relative_euler", "relative_6d")
"""Derivations of motions: all states follow from the first state and the actions."""


class WorldModelVectorEnv(VectorEnv):
    """Vectorized environment backed by a world model.

    In each step, rows with equally long histories share one model call. Row i with seed s shows the same episode as `WorldModelEnv`
    with seed s. The observation is a dict. `pixels` (H, W, 3), uint8, is the last frame. `agent_pos` (S,), float32, is the robot
    state, if it is available: `proprioception` predicts it from the frame, or it is composed from the start state and the actions
    if `starts` have states and the action derivation is one of `COMPOSED`. A commanded target is never reported as a state.

    With the autoreset mode `DISABLED`, a finished row keeps its last observation and flags, with reward 0, until it is reset, for
    example by `reset(options={"reset_mask": mask})`. A step after all rows have finished raises an error.

    Args:
        model: A world model, such as `IRASimPipeline`.
        num_envs: Number of rows.
        starts: `Start`s or their frames, one of which is drawn at random for each episode. If None, every reset must pass
            `options={"frames": ...}`, and automatic resets raise an error.
        reward: Reward of each frame, see `FrameFunction`. If None, the reward is 0.
        success: Success of each frame, bool; it terminates the episode. If None, episodes never terminate.
        proprioception: Model that predicts the robot state from a frame.
        max_episode_steps: Steps after which an episode is truncated.
        rescale_actions: Take actions in [-1, 1] and map them linearly to the bounds; 1 is one normalized unit for a component
            that lacks a bound.
        clip_actions: Clip actions to the bounds instead of raising an error.
        autoreset_mode: Gymnasium's `NextStep`, `SameStep` or `Disabled`.
        render_mode: `"rgb_array"` or None.
        sampling: Passed to `model.advance`, such as `{"num_inference_steps": 4}`.

    Raises:
        ValueError: If an argument is invalid.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        model: WorldModel,
        num_envs: int = 1,
        starts: Sequence[Any] | None = None,
        reward: FrameFunction | None = None,
        success: FrameFunction | None = None,
        proprioception: ProprioceptionModel | None = None,
        max_episode_steps: int = 300,
        rescale_actions: bool = False,
        clip_actions: bool = False,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"`render_mode` must be 'rgb_array' or None, got {render_mode!r}.")
        if starts is not None and not len(starts):
            raise ValueError("`starts` must contain at least one start, got none.")
        self.model, self.num_envs, self.starts = model, num_envs, starts
        self.reward, self.success, self.proprioception = reward, success, proprioception
        self.max_episode_steps, self.rescale_actions, self.clip_actions = (
            max_episode_steps,
            rescale_actions,
            clip_actions,
        )
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.render_mode = render_mode
        self.sampling = dict(sampling or {})
        self.metadata = self.metadata | {
            "autoreset_mode": self.autoreset_mode,
            "render_fps": model.fps or self.metadata["render_fps"],
        }
        self._raw_box = model.action_space.box()
        self.single_action_space = self._raw_box
        if rescale_actions:
            self.single_action_space = gymnasium.spaces.Box(-1, 1, self._raw_box.shape, np.float32)
        self.single_observation_space = gymnasium.spaces.Dict(self._observation_spaces())
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._random = [np.random.default_rng() for _ in range(num_envs)]
        self._states: list[RolloutState | None] = [None] * num_envs
        self._robot = np.zeros((num_envs, self._state_dim), np.float64)
        self._pixels: np.ndarray = np.zeros((num_envs, *model.frame_size, 3), np.uint8)
        self._steps = np.zeros(num_envs, np.int64)
        self._terminated, self._truncated, self._succeeded = np.zeros((3, num_envs), bool)

    @classmethod
    def from_pretrained(cls, model: Any, num_envs: int = 1, device: Any = None, **options: Any) -> Self:
        """Create environments from a pipeline and the models stored with it; see `load_world_model`.

        Args:
            model: Folder or Hub id of a pipeline, or a world model.
            num_envs: Number of rows.
            device: Device of a loaded pipeline; None for CUDA if available, else the CPU.
            options: Arguments of the class. They take precedence over the models stored with the pipeline.

        Raises:
            ValueError: If the pipeline, a stored model, the stored start frames or an argument is invalid.
            OSError: If the pipeline or a file of a stored model is not found.
        """
        return cls(num_envs=num_envs, **load_world_model(model, device) | options)

    @property
    def _max_episode_steps(self) -> int:
        """Alias that LeRobot reads."""
        return self.max_episode_steps

    def _observation_spaces(self) -> dict[str, gymnasium.Space]:
        spaces: dict[str, gymnasium.Space] = {
            "pixels": gymnasium.spaces.Box(0, 255, (*self.model.frame_size, 3), np.uint8)
        }
        self._state_dim = 0
        if self.proprioception is not None:
            config = self.proprioception.config
            spaces["agent_pos"] = gymnasium.spaces.Box(
                np.float32(config.state_low), np.float32(config.state_high), dtype=np.float32
            )
        elif self.starts is not None and self.model.action_space.derivation in COMPOSED:
            state = self._start(0).state
            if state is not None:
                spaces["agent_pos"] = gymnasium.spaces.Box(-np.inf, np.inf, state.shape, np.float32)
        if "agent_pos" in spaces:
            self._state_dim = spaces["agent_pos"].shape[0]  # type: ignore[index]
        return spaces

    def _start(self, index: int) -> Start:
        start = self.starts[index]  # type: ignore[index]
        return start if isinstance(start, Start) else Start(start)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: One seed, from which row i gets `seed + i`, or one seed per row. The seed of a row determines its start and its
                noise.
            options: `reset_mask`, bool (num_envs,), selects the rows to restart, by default all. `frames` contains the starts of
                these rows, which are drawn by default: (rows, h, H, W, 3), or a list of `Start`s or frames.

        Returns:
            Observations of all rows, and `{"is_success": ..., "_is_success": ...}`, both (num_envs,), bool.

        Raises:
            ValueError: If an argument, a start or the result of `success` is invalid, or there are no frames to start from.
        """
        options = options or {}
        rows = self._rows_to_reset(options.get("reset_mask"))
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + row for row in range(self.num_envs)]
        else:
            seeds = [None if each is None else int(each) for each in seed]
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"`seed` must be one integer or a list of {self.num_envs}, one per row, got {len(seeds)}."
            )
        if any(each is not None and each < 0 for each in seeds):
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        given = options.get("frames")
        if given is not None and len(given) != len(rows):
            raise ValueError(f"`frames` must be {len(rows)} histories, one per row to reset, got {len(given)}.")
        starts = None if given is None else [each if isinstance(each, Start) else Start(each) for each in given]
        for each in starts or []:
            self._check_start(each)
        if starts is None and self.starts is None:
            raise ValueError(
                "`reset` requires frames to start from, got None: pass `starts` to the environment or "
                '`options={"frames": ...}` to `reset`.'
            )
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
        for row in rows:
            if seeds[row] is not None:
                self._random[row] = np.random.default_rng(seeds[row])
        self._begin(rows, starts)
        return self._observation(), self._info()

    def _rows_to_reset(self, mask: Any) -> list[int]:
        if mask is None:
            return list(range(self.num_envs))
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"`reset_mask` must be bool ({self.num_envs},) with at least one True, got {mask.dtype} {mask.shape} with "
                f"{np.count_nonzero(mask)} True."
            )
        others = [str(row) for row in np.nonzero(~mask)[0] if self._states[row] is None]
        if others:
            raise ValueError(
                f"`reset_mask` must include all rows that have not been reset yet, got a mask without row {', '.join(others)}."
            )
        return np.nonzero(mask)[0].tolist()

    def _check_start(self, start: Start) -> None:
        size, wanted = start.frames.shape[1:3], self.model.frame_size
        if size != tuple(wanted):
            raise ValueError(
                f"`frames` must be {wanted[0]}x{wanted[1]} (height x width), got {size[0]}x{size[1]}: resize them."
            )
        composed = self._state_dim and self.proprioception is None
        if composed and (start.state is None or len(start.state) != self._state_dim):
            got = "none" if start.state is None else len(start.state)
            raise ValueError(
                f"`state` of a start must have {self._state_dim} components, got {got}: pass `Start(frames, state)`."
            )

    @torch.no_grad()
    def _begin(self, rows: list[int], starts: list[Start] | None = None) -> None:
        """Start rows from drawn or given starts."""
        if starts is None:
            if self.starts is None:
                raise ValueError(
                    "`starts` is required to reset finished rows: pass it, or `autoreset_mode='Disabled'`."
                )
            starts = [self._start(int(self._random[row].integers(len(self.starts)))) for row in rows]
            for start in starts:
                self._check_start(start)
        seeds = {row: int(self._random[row].integers(2**32)) for row in rows}
        by_length: dict[int, list[tuple[int, Start]]] = {}
        for row, start in zip(rows, starts, strict=True):
            by_length.setdefault(len(start.frames), []).append((row, start))
        for group in by_length.values():
            frames = np.stack([start.frames for _, start in group])
            state = self.model.start(frames, [seeds[row] for row, _ in group])
            for index, (row, _) in enumerate(group):
                self._states[row] = state.select([index])
        self._pixels[rows] = np.stack([start.frames[-1] for start in starts])
        self._steps[rows] = 0
        self._terminated[rows] = self._truncated[rows] = False
        last = torch.from_numpy(self._pixels[rows]).movedim(-1, -3)[:, None] / 255
        self._succeeded[rows] = self._evaluate("success", last) if self.success else False
        if self.proprioception is not None:
            self._robot[rows] = self.proprioception.read(last[:, 0])
        elif self._state_dim:
            self._robot[rows] = [start.state for start in starts]

    def step(self, actions: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Predict the next frame of every row.

        Args:
            actions: Actions (num_envs, A) within the action space. Those of finished rows are ignored.

        Returns:
            Observations, rewards (num_envs,), terminated, truncated, and the infos of `reset`; in the mode `SAME_STEP` also
            `final_obs` and `final_info` of finished episodes.

        Raises:
            ValueError: If actions have the wrong shape, are not finite or are out of bounds, if a row has not been reset or all
                episodes have ended (mode `DISABLED`), or if a prediction, reward or success is not finite or has the wrong shape.
                The state does not change in these cases. The automatic reset of a row raises an error if there are no `starts`.
        """
        finished = self._terminated | self._truncated
        if any(state is None for state in self._states):
            raise ValueError("`reset` must be called before `step`.")
        disabled = self.autoreset_mode == AutoresetMode.DISABLED
        if disabled and finished.all():
            raise ValueError("every episode has ended: call `reset` before the next `step`.")
        running = np.nonzero(~finished)[0].tolist()
        raw = self._raw_actions(actions, running)
        rewards = np.zeros(self.num_envs)
        if running:
            self.model.action_space.prepare(raw[running])  # also checks components without bounds
            rewards[running] = self._advance(running, raw[running])
        restarted = np.nonzero(finished)[0].tolist()
        if restarted and not disabled:  # only in the mode NEXT_STEP: SAME_STEP leaves no row finished
            self._begin(restarted)
        terminated, truncated = self._terminated.copy(), self._truncated.copy()
        ended = np.nonzero(terminated | truncated)[0].tolist()
        info: dict[str, Any] = {}
        if ended and self.autoreset_mode == AutoresetMode.SAME_STEP:
            info = self._final_info(ended)
            self._begin(ended)
        return self._observation(), rewards, terminated, truncated, self._info() | info

    def _raw_actions(self, actions: Any, running: list[int]) -> np.ndarray:
        """Check actions and convert them to raw units (num_envs, A)."""
        wanted = f"`actions` must be ({self.num_envs}, {len(self.model.action_space)})"
        try:
            actions = np.asarray(actions, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{wanted}, all numbers: {str(error).rstrip('.')}.") from error
        if actions.shape != self.action_space.shape:
            raise ValueError(f"{wanted}, one action per row, got {actions.shape}.")
        space = self.single_action_space
        low, high = space.low, space.high  # type: ignore[attr-defined]
        for row in running:
            action = actions[row]
            if not np.isfinite(action).all():
                raise ValueError(f"`actions` must be finite, got {action.tolist()} in row {row}: check the policy.")
            outside = (action < low) | (action > high)
            if outside.any() and not self.clip_actions:
                place = int(np.nonzero(outside)[0][0])
                raise ValueError(
                    f"`actions` must be in [{low[place]:g}, {high[place]:g}] for {self.model.action_space.names[place]!r}, got "
                    f"{action[place]:g} in row {row}: check the units, or pass clip_actions=True."
                )
        actions = np.clip(actions, low, high)
        if not self.rescale_actions:
            return actions
        bounded = np.isfinite(self._raw_box.low) & np.isfinite(self._raw_box.high)
        with np.errstate(invalid="ignore"):
            scaled = self._raw_box.low + (actions + 1) / 2 * (self._raw_box.high - self._raw_box.low)
        normalized = self.model.action_space.denormalise(actions.astype(np.float64))
        return np.clip(np.where(bounded, scaled, normalized), self._raw_box.low, self._raw_box.high)

    @torch.no_grad()
    def _advance(self, rows: list[int], actions: np.ndarray) -> np.ndarray:
        """Predict the next frame of the running rows; return their rewards (rows,)."""
        commands = torch.from_numpy(actions.astype(np.float32))[:, None]  # (rows, 1, A)
        by_length: dict[int, list[int]] = {}  # histories are shorter after a start from fewer frames
        for index, row in enumerate(rows):
            by_length.setdefault(self._states[row].latents.shape[2], []).append(index)  # type: ignore[union-attr]
        frames = torch.empty(len(rows), 1, 3, *self.model.frame_size)
        after: dict[int, RolloutState] = {}
        for group in by_length.values():
            state = concatenate([self._states[rows[index]] for index in group])  # type: ignore[misc]
            state, latents = self.model.advance(state, commands[group], **self.sampling)
            frames[group] = self.model.decode(latents)[:, :1].float().cpu()
            after |= {rows[index]: state.select([position]) for position, index in enumerate(group)}
        if not torch.isfinite(frames).all():
            raise ValueError("the predicted frames must be finite: check the weights of the model and its dtype.")
        rewards = self._evaluate("reward", frames) if self.reward else np.zeros(len(rows))
        success = self._evaluate("success", frames).astype(bool) if self.success else np.zeros(len(rows), bool)
        if self.proprioception is not None:
            self._robot[rows] = self.proprioception.read(frames[:, 0])
        elif self._state_dim:
            derivation = self.model.action_space.derivation
            for row, action in zip(rows, actions, strict=True):
                self._robot[row] = integrate_actions(self._robot[row], action[None], derivation)[-1]
        for row, state in after.items():
            self._states[row] = state
        self._pixels[rows] = (255 * frames[:, 0]).round().byte().movedim(-3, -1).numpy()
        self._steps[rows] += 1
        self._terminated[rows] = self._succeeded[rows] = success
        self._truncated[rows] = self._steps[rows] >= self.max_episode_steps
        return rewards

    def _evaluate(self, name: str, frames: torch.Tensor) -> np.ndarray:
        """Apply the function `reward` or `success` to frames (B, 1, 3, H, W); return values (B,)."""
        values = torch.as_tensor(getattr(self, name)(frames)).detach().cpu()
        if values.shape != frames.shape[:2]:
            raise ValueError(f"`{name}` must return {tuple(frames.shape[:2])}, got {tuple(values.shape)}.")
        if not torch.isfinite(values).all():
            raise ValueError(f"`{name}` must return finite values, got {values.flatten().tolist()!r:.80}.")
        return values[:, 0].double().numpy()

    def _observation(self) -> dict[str, np.ndarray]:
        observation = {"pixels": self._pixels.copy()}
        if self._state_dim:
            observation["agent_pos"] = self._robot.astype(np.float32)
        return observation

    def _info(self) -> dict[str, Any]:
        return {"is_success": self._succeeded.copy(), "_is_success": np.ones(self.num_envs, bool)}

    def _final_info(self, rows: list[int]) -> dict[str, Any]:
        """Return the last observations and infos of episodes that end in this step, in Gymnasium's form."""
        observation = self._observation()
        info: dict[str, Any] = {}
        for row in rows:
            last = {key: value[row] for key, value in observation.items()}
            final = {"final_obs": last, "final_info": {"is_success": bool(self._succeeded[row])}}
            info = self._add_info(info, final, row)
        return info

    def render(self) -> tuple[np.ndarray, ...]:
        """Return the last frame (H, W, 3) of each row, uint8.

        Raises:
            ValueError: If `render_mode` is None.
        """
        if self.render_mode is None:
            raise ValueError("`render_mode` must be 'rgb_array' to render, got None.")
        return tuple(self._pixels.copy())

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return a tuple with one entry per row, like `SyncVectorEnv.call`.

        An attribute is repeated, and so is None from a method. Any other result of a method must have one entry per row.
        """
        value = getattr(self, name)
        if callable(value):
            value = value(*args, **kwargs)
            if value is not None:
                return tuple(value)
        return (value,) * self.num_envs

    get_attr = call

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute, which all rows share.

        Args:
            name: Name of the attribute.
            values: The value, or a list with the same value for each row.

        Raises:
            ValueError: If the values of the rows differ, or a list does not have one value per row.
        """
        rows = values if isinstance(values, list | tuple) else [values] * self.num_envs
        if len(rows) != self.num_envs or any(not np.array_equal(each, rows[0]) for each in rows):
            raise ValueError(
                f"`values` must be one value for all {self.num_envs} rows, which share {name!r}, got {values!r:.80}."
            )
        setattr(self, name, rows[0])


class WorldModelEnv(gymnasium.Env):
    """Single environment backed by a world model.

    `reset(options={"frames": ...})` starts from the given history (H, W, 3) or (h, H, W, 3), or from a `Start`. A step after the
    end of the episode raises an error.

    Args:
        model: A world model, such as `IRASimPipeline`.
        starts: See `WorldModelVectorEnv`.
        options: Other arguments of `WorldModelVectorEnv`, except `num_envs` and `autoreset_mode`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, model: WorldModel, starts: Sequence[Any] | None = None, **options: Any) -> None:
        self._rows = WorldModelVectorEnv(model, 1, starts, autoreset_mode=AutoresetMode.DISABLED, **options)
        self.metadata = self.metadata | {"render_fps": self._rows.metadata["render_fps"]}
        self.render_mode = self._rows.render_mode
        self.action_space = self._rows.single_action_space
        self.observation_space = self._rows.single_observation_space

    @classmethod
    def from_pretrained(cls, model: Any, device: Any = None, **options: Any) -> Self:
        """Create an environment from a pipeline and the models stored with it.

        Arguments and errors are those of `WorldModelVectorEnv.from_pretrained`, without `num_envs` and `autoreset_mode`.
        """
        return cls(**load_world_model(model, device) | options)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start a new episode; see `WorldModelVectorEnv.reset`."""
        super().reset(seed=seed)
        options = {} if options is None else dict(options)
        if options.get("frames") is not None:
            options["frames"] = [options["frames"]]
        self._rows._random[0] = self.np_random
        observation, info = self._rows.reset(options=options)
        return self._only(observation), {"is_success": bool(info["is_success"][0])}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Predict the next frame; see `WorldModelVectorEnv.step`."""
        observation, reward, terminated, truncated, info = self._rows.step(np.asarray(action)[None])
        success = {"is_success": bool(info["is_success"][0])}
        return self._only(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), success

    def render(self) -> np.ndarray:
        """Return the last frame (H, W, 3), uint8; see `WorldModelVectorEnv.render`."""
        return self._rows.render()[0]

    def _only(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in observation.items()}


make_env = WorldModelEnv.from_pretrained
make_vector_env = WorldModelVectorEnv.from_pretrained

for _name, _model in (("irasim/PushT-v0", {"model": str(embedded_checkpoint())}), ("irasim/WorldModel-v0", {})):
    if _name not in gymnasium.registry:
        gymnasium.register(
            _name, f"{__name__}:make_env", vector_entry_point=f"{__name__}:make_vector_env", kwargs=_model
        )
