"""Driving a robot in a world model: commands of keys, sticks or pose streams as actions, and the rollout that they steer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from .action_space import ActionSpace
from .actions import prepare_actions
from .files import temporary_path
from .pipelines import IRASimPipeline
from .rollout import RolloutState

PICTURE_KEYS = (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))
"""Keys of the negative and the positive direction of each component, where these are a picture's: right and down."""

TABLE_KEYS = PICTURE_KEYS[::-1]
"""Of planar motions seen from opposite the robot, as in Language-Table: its x away from the base, its y to the left."""

ARM_KEYS = (
    ("ArrowDown", "ArrowUp"),
    ("ArrowRight", "ArrowLeft"),
    ("f", "r"),
    ("j", "l"),
    ("k", "i"),
    ("o", "u"),
    ("h", "g"),
)
"""Of an arm seen from behind its base, x forwards, y to the left, z up; then roll, pitch, yaw and gripper."""

SAME_KEYS = {"w": "ArrowUp", "a": "ArrowLeft", "s": "ArrowDown", "d": "ArrowRight"}


@dataclass(frozen=True)
class Control:
    """One direction of one component of the action space."""

    key: str  # as a browser's KeyboardEvent.key says
    component: int
    sign: int  # -1 or 1
    label: str  # such as "target_x +"


class Steering:
    """Turns commands in [-1, 1] into actions of a checkpoint's space.

    A motion is as large as the command says; a target, such as those of absolute spaces and an arm's gripper, moves on from where
    it is and stays within the space's bounds. The command zero holds: no motion, and the same target.

    Args:
        config: The transformer's config, which holds the action space.
        speed: What a command of 1 means for a step, in units of normalised actions: `speed / action_scale` raw ones.
        start: Action (A,) to begin from, for spaces with targets: where the robot is.
        keys: Keys of the negative and the positive direction of each component; None for those that suit the space. No key turns
            the hand where the space has its rotation as columns of a matrix (`relative_6d`).

    Raises:
        ValueError: If a space with targets is given no start, or one of another dimension.
    """

    def __init__(
        self,
        config: Any,
        speed: float = 1.0,
        start: Any = None,
        keys: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self.action_space = space = ActionSpace.from_config(config)
        size = len(space)
        self.space, self.derivation, self.names = space.kind, space.derivation, list(space.names)
        self.speed = speed
        self.low, self.high = np.array(space.low), np.array(space.high)
        if start is None:
            if space.has_targets:
                raise ValueError(
                    f"`start` must be the robot's own ({', '.join(self.names)}) for absolute actions, got none: the target "
                    "moves on from there."
                )
            start = space.clip(np.zeros(size))
        self.start = prepare_actions([start], size)[0, 0].double().numpy()
        planar = PICTURE_KEYS if self.space == "absolute" else TABLE_KEYS
        self.keys = dict(enumerate(keys if keys is not None else planar if size == 2 else ARM_KEYS))  # by component
        if keys is None and self.derivation == "relative_6d":
            self.keys = dict(enumerate(ARM_KEYS[:3])) | {9: ARM_KEYS[-1]}
        self.keys = {component: pair for component, pair in self.keys.items() if component < size}
        self.last = self.start

    @property
    def step(self) -> np.ndarray:
        """What a command of 1 moves (A,), raw units."""
        return self.speed / np.array(self.action_space.scale)

    @property
    def controls(self) -> list[Control]:
        """What a key steers; components beyond the keys are left to `action`."""
        return [
            Control(key, component, sign, f"{self.names[component]} {'+' if sign > 0 else '-'}")
            for component, pair in self.keys.items()
            for key, sign in zip(pair, (-1, 1), strict=True)
        ]

    def command(self, pressed: Iterable[str]) -> np.ndarray:
        """The command (A,) of the keys that are pressed; WASD stand for the arrows, unknown keys for nothing."""
        keys = {key if len(key) > 1 else key.lower() for key in pressed}
        keys = {SAME_KEYS.get(key, key) for key in keys}
        command = np.zeros(len(self.start))
        for control in self.controls:
            command[control.component] += control.sign * (control.key in keys)
        return command

    def action(self, command: Any) -> np.ndarray:
        """The action (A,) of a command, after those before it.

        Args:
            command: Numbers (A,) in [-1, 1], one a component.

        Returns:
            The action in raw units.

        Raises:
            ValueError: If the command is of another dimension, not finite, or out of range.
        """
        command = prepare_actions([command], len(self.start))[0, 0].double().numpy()
        if np.abs(command).max() > 1:
            raise ValueError(f"`command` must be in [-1, 1], got {command.tolist()}.")
        hold = self.hold()  # within bounds by definition, whatever the data were
        self.last = np.clip(hold + self.step * command, np.minimum(self.low, hold), np.maximum(self.high, hold))
        return self.last.copy()

    def hold(self) -> np.ndarray:
        """The action (A,) that asks for no motion now."""
        return self.action_space.hold(self.last)

    def continue_from(self, action: np.ndarray | None) -> None:
        """Move targets on from those of an action (A,) in place of the last one; None for the start."""
        self.last = self.start if action is None else np.asarray(action, dtype=np.float64)


@dataclass(frozen=True)
class _Predicted:
    png: bytes
    action: np.ndarray  # (A,), raw units
    latents: torch.Tensor  # (1, C, 1, h, w)


class DrivingSession:
    """A rollout that is steered while it is predicted: frame after frame, with undo and a recording.

    The history is carried in latents; frames are kept as PNG, so that the memory of a session is bounded by `max_frames`
    small pictures. One session is for one user: a session is not safe for two threads, nor is its pipeline.

    Args:
        pipe: The world model.
        frames: The history, as a pipeline takes it.
        steering: What turns commands into actions.
        seed: Of the noise; the same steps from the same seed give the same frames.
        max_frames: Predicted frames that are kept; older ones are dropped from recording and undo.
        num_inference_steps: Denoising steps of each call; None takes the checkpoint's own number.
        resize: Resize the history to the checkpoint's frame size.

    Raises:
        ValueError: If the history does not suit the checkpoint, or is more than one.
    """

    longest_step = 16
    """Maximum number of actions per call of `step`."""

    def __init__(
        self,
        pipe: IRASimPipeline,
        frames: Any,
        steering: Steering,
        seed: int = 0,
        max_frames: int = 3000,
        num_inference_steps: int | None = None,
        resize: bool = False,
    ) -> None:
        if max_frames < 1:
            raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
        pixels = pipe.preprocess_frames(frames, resize)
        if len(pixels) != 1:
            raise ValueError(f"`frames` must be one history, got {len(pixels)}.")
        self.pipe = pipe
        self.steering = steering
        self.seed = seed
        self.num_inference_steps = num_inference_steps
        with torch.no_grad():
            self._history = pipe.encode_history(pixels)  # (1, C, h, H, W)
        self.first_frame: PIL.Image.Image = pipe.video_processor.postprocess(pixels[0, -1:])[0]
        self._kept: deque[_Predicted] = deque(maxlen=max_frames)
        self.reset()

    @property
    def frames(self) -> list[PIL.Image.Image]:
        """The predicted frames that are kept, one for each of `actions`."""
        return [PIL.Image.open(BytesIO(each.png)) for each in self._kept]

    @property
    def actions(self) -> np.ndarray:
        """The actions (n, A) of the frames that are kept, raw units."""
        return np.array([each.action for each in self._kept]).reshape(-1, self.pipe.transformer.config.action_dim)

    def __len__(self) -> int:
        return len(self._kept)

    def reset(self) -> None:
        """Begin anew from the first history."""
        self._kept.clear()
        self._before = self._history  # latents that the kept frames follow
        self._last_dropped: _Predicted | None = None
        self._num_dropped = 0
        self._steer_on()

    def undo(self, num_frames: int = 1) -> PIL.Image.Image:
        """Take frames back, as many as asked for and kept.

        Returns:
            The frame that is the last one now.

        Raises:
            ValueError: If the number is negative.
        """
        if num_frames < 0:
            raise ValueError(f"`num_frames` must not be negative, got {num_frames}.")
        for _ in range(min(num_frames, len(self._kept))):
            self._kept.pop()
        self._steer_on()
        return self.last_frame

    @property
    def last_frame(self) -> PIL.Image.Image:
        """The frame that the next step goes on from."""
        return PIL.Image.open(BytesIO(self._last.png)) if self._last else self.first_frame

    @property
    def _last(self) -> _Predicted | None:
        return self._kept[-1] if self._kept else self._last_dropped

    def drive(self, pressed: Iterable[str], num_frames: int = 1) -> list[PIL.Image.Image]:
        """Predict the next frames while the same keys are held; see `Steering.command` and `step`."""
        if not 1 <= num_frames <= self.longest_step:
            raise ValueError(f"`num_frames` must be in [1, {self.longest_step}], got {num_frames}.")
        command = self.steering.command(pressed)
        return self.step([self.steering.action(command) for _ in range(num_frames)])

    @torch.no_grad()
    def step(self, actions: Any) -> list[PIL.Image.Image]:
        """Predict the frames of the next actions.

        Args:
            actions: Actions (n, A) in raw units, `longest_step` at most.

        Returns:
            n frames.

        Raises:
            ValueError: If the actions do not suit the checkpoint, or are too many; nothing has happened then.
        """
        try:
            return self._predict(actions)
        finally:
            self._steer_on()  # also where it fails: commands have moved the targets before

    def _predict(self, actions: Any) -> list[PIL.Image.Image]:
        checked = self.pipe.action_space.prepare(actions)
        if len(checked) != 1 or checked.shape[1] > self.longest_step:
            raise ValueError(
                f"`actions` must be one sequence of at most {self.longest_step}, got {tuple(checked.shape[:2])}: give "
                "the rest to another step."
            )
        recent = [each.latents for each in list(self._kept)[-self._history_length :]]
        history = torch.cat([self._before, *recent], dim=2)[:, :, -self._history_length :]
        step = torch.tensor([self._num_dropped + len(self._kept)])  # after undo the noise is the same
        state = RolloutState(history, (self.seed,), step)
        future = self.pipe.predict_latents(state, checked, self.num_inference_steps)
        if not torch.isfinite(future).all():
            raise ValueError("the predicted frames must be finite: check the weights of the checkpoint and its dtype.")
        pictures = self.pipe.video_processor.postprocess_video(self.pipe.decode_latents(future), "pil")[0]
        self._keep(pictures, checked[0], future)
        return pictures

    @torch.no_grad()
    def append(self, frames: Sequence[PIL.Image.Image], actions: Any) -> None:
        """Append frames that an earlier session predicted, to continue its rollout here.

        Args:
            frames: The n frames, RGB, of the checkpoint's frame size.
            actions: The actions (n, A) in raw units that led to them.

        Raises:
            ValueError: If there are no frames, their number differs from that of the actions, or one has another size; nothing
                is appended then.
        """
        checked = self.pipe.action_space.prepare(actions)
        size = self.pipe.frame_size[::-1]
        if checked.shape[:2] != (1, len(frames)) or any(frame.size != size for frame in frames):
            raise ValueError(
                f"`frames` must be one image of {size[0]}x{size[1]} pixels for each action, got {len(frames)} of "
                f"{sorted({'x'.join(map(str, frame.size)) for frame in frames})} for actions {tuple(checked.shape)}."
            )
        images = [frame.convert("RGB") for frame in frames]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        self._keep(images, checked[0], self.pipe.encode_history(pixels[None] / 127.5 - 1))
        self._steer_on()

    def _keep(self, frames: Sequence[PIL.Image.Image], actions: torch.Tensor, latents: torch.Tensor) -> None:
        for frame, action, latent in zip(frames, actions, latents.split(1, dim=2), strict=True):
            if len(self._kept) == self._kept.maxlen:
                self._last_dropped = self._kept[0]
                self._before = torch.cat([self._before, self._kept[0].latents], dim=2)[:, :, -self._history_length :]
                self._num_dropped += 1
            self._kept.append(_Predicted(_png(frame), action.double().numpy(), latent.clone()))

    def _steer_on(self) -> None:
        self.steering.continue_from(self._last.action if self._last else None)

    @property
    def _history_length(self) -> int:
        return self.pipe.transformer.config.num_history_frames

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write the recording: an mp4, the frame before those kept and they, and a `.npy` of the actions (n, A) beside it.

        Returns:
            Both paths.

        Raises:
            ValueError: If nothing has been predicted.
        """
        from .data import write_video  # whose libraries take seconds to import

        if not self._kept:
            raise ValueError("nothing has been predicted yet: drive first.")
        path = Path(path).with_suffix(".mp4")
        before = self._last_dropped
        first = PIL.Image.open(BytesIO(before.png)) if before else self.first_frame
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in (first, *self.frames)])
        write_video(path, frames, self.pipe.transformer.config.fps or 10)
        with temporary_path(path.with_suffix(".npy")) as partial:
            np.save(partial, self.actions.astype(np.float32))
        return path, path.with_suffix(".npy")


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
