"""Policies: the interface, adapters for callables and LeRobot policies, and closed-loop planning.

An observation is a dictionary of arrays or tensors with B rows: `pixels` (B, H, W, 3), uint8, and usually `agent_pos` (B, S), as
in LeRobot's Gymnasium environments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download

from .action_space import ActionSpace
from .devices import default_device
from .json_files import read_json
from .planning import Plan
from .rollout import RolloutState, WorldModel

Observation = Mapping[str, Any]
"""`pixels` (B, H, W, 3), uint8, and other arrays with B rows."""

PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
"""Files of LeRobot's processors in the folder of a policy."""
REMOTE_CODE_POLICIES = ("gaussian_actor", "groot", "pi0_fast", "wall_x")
"""LeRobot's policy types that are loaded with `trust_remote_code=True`."""
REMOTE_CODE_STEPS = ("action_tokenizer_", "groot_", "reward_classifier_", "robometer_", "topreward_")
"""Name prefixes of LeRobot's processor steps that load models with `trust_remote_code=True`."""


class Policy(Protocol):
    """Interface of a policy, as in LeRobot. Any object with these methods is a policy."""

    def reset(self) -> None:
        """Forget the current episode."""
        ...

    def select_action(self, observation: Observation) -> torch.Tensor:
        """Return the next action of each row (B, A), raw units."""
        ...


class Planner(Protocol):
    """Interface of a planner, see `irasim_diffusers.planning`."""

    def __call__(self, model: WorldModel, state: RolloutState, objective: Any, init: Any = None) -> Plan:
        """Plan from a state with one row."""
        ...


class ChunkPolicy:
    """Policy from a callable that returns actions (B, A), or chunks of actions (B, n, A).

    Args:
        function: Maps an observation to actions or a chunk, raw units.
        action_space: The action space, against which actions are checked.
        num_executed: Number of actions of a chunk that are executed before the function is called again; None for all.

    Raises:
        ValueError: If `num_executed` is less than 1.
    """

    def __init__(
        self,
        function: Callable[[Observation], Any],
        action_space: ActionSpace,
        num_executed: int | None = None,
    ) -> None:
        if num_executed is not None and num_executed < 1:
            raise ValueError(f"`num_executed` must be at least 1, got {num_executed}.")
        self.function, self.action_space, self.num_executed = function, action_space, num_executed
        self._queue: deque[torch.Tensor] = deque()

    def reset(self) -> None:
        """Discard the remaining actions of the chunk."""
        self._queue.clear()

    def select_action(self, observation: Observation) -> torch.Tensor:
        """Return the next action of each row (B, A), raw units.

        Raises:
            ValueError: If the observation has no valid `pixels`, or the actions that the function returns have the wrong shape,
                are not finite, are far out of bounds, or are fewer than `num_executed`.
        """
        if not self._queue:
            rows = num_rows(observation)
            chunk = check_chunk(torch.as_tensor(self.function(observation)), self.action_space, rows)
            number = chunk.shape[1] if self.num_executed is None else self.num_executed
            if number > chunk.shape[1]:
                raise ValueError(
                    f"the policy must return at least `num_executed` = {number} actions per chunk, got {chunk.shape[1]}."
                )
            self._queue.extend(chunk[:, :number].unbind(1))
        return self._queue.popleft()


class LeRobotPolicy:
    """Adapter that runs a LeRobot policy and its processors in this package's environments.

    Args:
        policy: The policy, such as `lerobot.policies.diffusion.DiffusionPolicy`.
        action_space: The action space, against which actions are checked.
        preprocessor: Preprocessor from `make_pre_post_processors`, optional.
        postprocessor: Postprocessor of the actions, optional.
        camera: Key of the image in the policy's batch.
        task: Description of the task, for policies that take one.
    """

    def __init__(
        self,
        policy: Any,
        action_space: ActionSpace,
        preprocessor: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        postprocessor: Callable[[torch.Tensor], torch.Tensor] | None = None,
        camera: str = "observation.image",
        task: str | None = None,
    ) -> None:
        self.policy, self.action_space, self.camera, self.task = policy, action_space, camera, task
        self.preprocessor, self.postprocessor = preprocessor, postprocessor

    @classmethod
    def from_pretrained(
        cls, name: str, action_space: ActionSpace, device: Any = None, task: str | None = None
    ) -> LeRobotPolicy:
        """Load a policy and its processors. No code from the policy's repository is executed.

        Args:
            name: Folder or Hub id of the policy.
            action_space: The action space of the world model.
            device: Device of the policy; None for CUDA if available, else the CPU.
            task: Description of the task, for policies that take one.

        Raises:
            ValueError: If LeRobot is not installed, the policy cannot be loaded or does not take exactly one camera, or loading
                the policy could execute code from a repository.
        """
        try:
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.factory import get_policy_class, make_pre_post_processors
            from lerobot.processor import ProcessorStepRegistry
        except ImportError as error:
            raise ValueError(
                f"loading the LeRobot policy {name!r} requires lerobot: pip install 'lerobot>=0.6'."
            ) from error
        device = str(default_device() if device is None else device)
        folder = policy_folder(name)  # one snapshot, so that the files that are checked are the files that are loaded
        try:
            config = PreTrainedConfig.from_pretrained(folder)
            config.device = device
            if config.type in REMOTE_CODE_POLICIES:
                raise ValueError(
                    f"policies of type {config.type} execute code from the repositories that their config names: load the policy "
                    "yourself and pass it to `LeRobotPolicy`."
                )
            policy_class = get_policy_class(config.type)  # registers its processor steps
            for file in PROCESSORS:
                check_processor(folder / file, ProcessorStepRegistry._registry)
            policy = policy_class.from_pretrained(folder, config=config)
            overrides = {"device_processor": {"device": device}}
            before, after = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
        except Exception as error:  # the loaders raise errors of many types for damaged files
            raise ValueError(f"the LeRobot policy {name!r} could not be loaded: {error}") from error
        cameras = [key for key, feature in config.input_features.items() if feature.type.name == "VISUAL"]
        if len(cameras) != 1:
            raise ValueError(f"{name!r} must take one camera, got {', '.join(cameras) or 'none'}.")
        return cls(policy, action_space, before, after, cameras[0], task)

    def reset(self) -> None:
        """Reset the policy."""
        self.policy.reset()

    @torch.no_grad()
    def select_action(self, observation: Observation) -> torch.Tensor:
        """Return the next action of each row (B, A), raw units.

        Raises:
            ValueError: If the observation has no valid `pixels`, or the actions that the policy returns have the wrong shape, are
                not finite, or are far out of bounds.
        """
        rows = num_rows(observation)
        actions = self.policy.select_action(self._batch(observation))
        if self.postprocessor is not None:
            actions = self.postprocessor(actions)
        return check_chunk(torch.as_tensor(actions), self.action_space, rows, single=True)[:, 0]

    def _batch(self, observation: Observation) -> dict[str, Any]:
        pixels = torch.as_tensor(observation["pixels"])
        batch: dict[str, Any] = {self.camera: pixels.movedim(-1, -3).float() / 255}
        if "agent_pos" in observation:
            batch["observation.state"] = torch.as_tensor(observation["agent_pos"]).float()
        if self.task is not None:
            batch["task"] = [self.task] * len(pixels)
        return batch if self.preprocessor is None else self.preprocessor(batch)


def policy_folder(name: str) -> Path:
    """Return the folder of a policy; files of a Hub repository are downloaded.

    Raises:
        ValueError: If the folder or repository does not exist or cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the Hub client raises errors of many types
        raise ValueError(f"{name!r} must be the folder or Hub id of a policy: {error}") from error


def check_processor(path: Path, steps: Mapping[str, type]) -> None:
    """Check that a processor config cannot execute code: LeRobot imports any class that the config names.

    Args:
        path: JSON file with the list `steps`.
        steps: LeRobot's registered processor steps by name.

    Raises:
        ValueError: If the file cannot be read or has no list `steps`, or if a step is not one of LeRobot's own registered steps
            or loads code from another repository.
    """
    content = read_json(path)
    entries = content.get("steps") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path.name} must contain a list 'steps' of objects.")
    for entry in entries:
        name = entry.get("registry_name")
        step = steps.get(name) if isinstance(name, str) else None
        if step is None or step.__module__.partition(".")[0] != "lerobot":
            found = name if "registry_name" in entry else entry.get("class")
            raise ValueError(
                f"{path.name} must contain only registered steps of LeRobot, got {found!r:.80}, which could execute arbitrary "
                "code: load the policy yourself and pass it to `LeRobotPolicy`."
            )
        if str(name).startswith(REMOTE_CODE_STEPS):
            raise ValueError(
                f"{path.name} contains the step {name!r}, which executes code from the repository that it names: load the policy "
                "yourself and pass it to `LeRobotPolicy`."
            )


class PlannerPolicy:
    """Policy that plans in closed loop: it executes the first actions of a plan, then plans again.

    A new plan starts from the observed frames. Rows are planned one after another, with the same seeds, so that a row
    does not depend on the others.

    Args:
        model: The world model.
        planner: The planner, see `irasim_diffusers.planning`.
        objective: Function that scores frames; higher is better.
        num_executed: Number of actions that are executed before the next plan.
        num_history_frames: Maximum number of observed frames from which the model starts.
        propose: Maps an observation of one row to candidates (K, n, A) in raw units, such as samples of a policy. None to start
            from the remaining actions of the previous plan, followed by hold actions; the planner chooses the start of the first
            plan.
        seed: Seed of the model's noise; plan k of an episode uses `seed + k`.

    Raises:
        ValueError: If a number is out of range.

    Attributes:
        plans: The latest plan of each row.
    """

    def __init__(
        self,
        model: WorldModel,
        planner: Planner,
        objective: Any,
        num_executed: int = 8,
        num_history_frames: int = 1,
        propose: Callable[[Observation], Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_executed", num_executed, 1),
            ("num_history_frames", num_history_frames, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.model, self.planner, self.objective, self.propose = model, planner, objective, propose
        self.num_executed, self.num_history_frames, self.seed = num_executed, num_history_frames, seed
        self.reset()

    def reset(self) -> None:
        """Forget the observed frames and the plans."""
        self.plans: list[Plan] = []
        self._frames: deque[torch.Tensor] = deque(maxlen=self.num_history_frames)
        self._queue: deque[torch.Tensor] = deque()
        self._num_plans = 0

    def select_action(self, observation: Observation) -> torch.Tensor:
        """Return the next action of each row (B, A) in raw units.

        A new plan is made every `num_executed` steps.

        Raises:
            ValueError: If the observation has no valid `pixels`, its number of rows changes within an episode, its frames do not
                match the model, the input of the planner is invalid, or a plan has fewer than `num_executed` actions.
            NoPlanError: If the planner finds no plan.
        """
        rows = num_rows(observation)
        if self._frames and len(self._frames[0]) != rows:
            raise ValueError(
                f"`observation` must have {len(self._frames[0])} rows as in the previous steps of this episode, got {rows}: call "
                "`reset` before a new episode."
            )
        self._frames.append(torch.as_tensor(observation["pixels"]).movedim(-1, -3))  # (B, 3, H, W)
        if not self._queue:
            self.plans = [self._plan(observation, row) for row in range(rows)]
            self._num_plans += 1
            chunk = torch.stack([plan.actions for plan in self.plans])
            if chunk.shape[1] < self.num_executed:
                raise ValueError(
                    f"`planner` must return at least `num_executed` = {self.num_executed} actions, got {chunk.shape[1]}."
                )
            self._queue.extend(chunk[:, : self.num_executed].unbind(1))
        return self._queue.popleft()

    def _plan(self, observation: Observation, row: int) -> Plan:
        frames = torch.stack([frame[row] for frame in self._frames])
        with torch.no_grad():
            state = self.model.start(frames, [self.seed + self._num_plans])
        init = None
        if self.propose is not None:
            init = self.propose({key: value[row : row + 1] for key, value in observation.items()})
        elif self.plans:
            rest = self.plans[row].actions[self.num_executed :]
            last = self.plans[row].actions[-1:]
            held = self.model.action_space.hold(last).repeat(len(self.plans[row].actions) - len(rest), 1)
            init = torch.cat([rest, held])
        return self.planner(self.model, state, self.objective, init)


def num_rows(observation: Observation) -> int:
    """Return the number of rows of an observation.

    Raises:
        ValueError: If the observation has no `pixels` (B, H, W, 3) with at least one row.
    """
    pixels = observation.get("pixels")
    if pixels is None or len(pixels.shape) != 4 or pixels.shape[-1] != 3 or not len(pixels):
        found = sorted(observation) if pixels is None else tuple(pixels.shape)
        raise ValueError(f"`observation` must have `pixels` (B, H, W, 3) with B at least 1, got {found}.")
    return len(pixels)


def check_chunk(actions: torch.Tensor, space: ActionSpace, rows: int, single: bool = False) -> torch.Tensor:
    """Check the actions of a policy and return them as (B, n, A), float32.

    Args:
        actions: One action (B, A) or a chunk (B, n, A) for each row.
        space: Action space of the world model or environment.
        rows: Number of rows B.
        single: Whether chunks are rejected.

    Raises:
        ValueError: If the actions have the wrong shape, are not finite, or are far out of bounds.
    """
    if actions.ndim not in ((2,) if single else (2, 3)) or len(actions) != rows or actions.shape[-1] != len(space):
        chunk = "" if single else f" or a chunk ({rows}, n, {len(space)})"
        raise ValueError(f"the policy must return actions ({rows}, {len(space)}){chunk}, got {tuple(actions.shape)}.")
    try:
        return space.prepare(actions[:, None] if actions.ndim == 2 else actions)
    except ValueError as error:
        raise ValueError(f"the policy returned invalid actions: {error}") from error
