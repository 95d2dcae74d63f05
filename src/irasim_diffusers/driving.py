"""Interactive rollouts: convert driving commands to actions and predict the next frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from .action_space import ActionSpace
from .actions import prepare_actions
from .files import temporary_path
from .pipelines.inputs import fit_frames, stack_frames
from .rollout import RolloutState, WorldModel, roll


class Steering:
    """Converts commands in [-1, 1] to actions of an action space.

    A relative component becomes a motion proportional to the command. A target (a component of an absolute space, or one that
    follows the motion of a pose, such as a gripper opening) moves from its last value. The command 0 means no motion and an
    unchanged target. Actions stay within the bounds of the space; a last value beyond the bounds does not move further out.

    Args:
        action_space: The action space of the world model, `model.action_space`.
        speed: Motion per step for a command of 1, in normalized actions: `speed / action_scale` in raw units.
        start: Action (A,) for the robot's current position; required if `action_space.has_targets`. None for zero, clipped to the
            bounds.

    Raises:
        ValueError: If `start` is missing although the space has targets, does not have A finite components, or is far outside the
            bounds.
    """

    def __init__(self, action_space: ActionSpace, speed: float = 1.0, start: Any = None) -> None:
        self.action_space, self.speed = action_space, speed
        if start is None:
            if action_space.has_targets:
                raise ValueError(
                    f"`start` must be the current position ({', '.join(action_space.names)}) for absolute actions, got None."
                )
            start = action_space.clip(np.zeros(len(action_space)))
        start = _finite_vector("start", start, len(action_space))
        try:
            self.start = action_space.prepare(start[None])[0, 0].double().numpy()
        except ValueError as error:
            raise ValueError(str(error).replace("`actions`", "`start`")) from error
        self.last = self.start

    @property
    def step(self) -> np.ndarray:
        """Motion (A,) per step for a command of 1, raw units."""
        return self.speed / np.array(self.action_space.scale)

    def action(self, command: Any) -> np.ndarray:
        """Return the action (A,), raw units, of a command that follows the earlier ones.

        Args:
            command: Numbers (A,) in [-1, 1], one per component.

        Raises:
            ValueError: If the command does not have A finite components, or is out of range.
        """
        command = _finite_vector("command", command, len(self.start))
        if np.abs(command).max() > 1:
            raise ValueError(f"`command` must be in [-1, 1], got {command.tolist()}.")
        hold = self.hold()  # a start or a recorded action may exceed the bounds
        low, high = np.minimum(self.action_space.low, hold), np.maximum(self.action_space.high, hold)
        self.last = np.clip(hold + self.step * command, low, high)
        return self.last.copy()

    def hold(self) -> np.ndarray:
        """Return the hold action (A,)."""
        return self.action_space.hold(self.last)

    def continue_from(self, action: np.ndarray | None) -> None:
        """Continue from `action` (A,), raw units; None restarts from `start`."""
        self.last = self.start if action is None else np.asarray(action, dtype=np.float64)


@dataclass(frozen=True)
class _Predicted:
    png: bytes
    action: np.ndarray  # (A,), raw units
    latents: torch.Tensor  # (1, C, 1, h, w)


MAX_MEMORIES = 32
"""Maximum number of calls of `DrivingSession.step` after which the model's memory is kept for `undo`."""


class DrivingSession:
    """Rollout that is steered while it is predicted, frame by frame, with undo and a recording.

    The history is kept as latents and the frames as PNG, so that `max_frames` bounds the memory of a session. A session serves one
    user: neither it nor its model may be used by two threads at once.

    Args:
        model: The world model, such as `IRASimPipeline`. The history has at most `model.num_history_frames` frames; without
            this attribute, as many as `frames`.
        frames: History frames: one frame or a history of PIL images, arrays (..., H, W, 3) or tensors (..., 3, H, W).
        steering: Converts commands to actions.
        seed: Seed of the noise; the same actions with the same seed give the same frames.
        max_frames: Maximum number of predicted frames to keep; older frames are removed from the recording and cannot be undone.
        num_inference_steps: Denoising steps per chunk; None for the model's default.
        resize: Resize the history to the model's frame size.

    Raises:
        ValueError: If `frames` is invalid, does not match the model or contains several histories, if `seed` is negative, or if
            `max_frames` is less than 1.
    """

    max_chunk = 16
    """Maximum number of actions per call of `step`."""

    def __init__(
        self,
        model: WorldModel,
        frames: Any,
        steering: Steering,
        seed: int = 0,
        max_frames: int = 3000,
        num_inference_steps: int | None = None,
        resize: bool = False,
    ) -> None:
        if max_frames < 1:
            raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
        pixels = fit_frames(stack_frames(frames), model.frame_size, resize)  # (1, h, 3, H, W) in [0, 1]
        if len(pixels) != 1:
            raise ValueError(f"`frames` must be one history, got {len(pixels)}.")
        self.model, self.steering = model, steering
        self._sampling = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
        self._first = model.start(pixels, [seed])
        self._history_length: int = getattr(model, "num_history_frames", self._first.latents.shape[2])
        self.first_frame: PIL.Image.Image = _images(pixels[0, -1:])[0]
        self._kept: deque[_Predicted] = deque(maxlen=max_frames)
        self.reset()

    @property
    def frames(self) -> list[PIL.Image.Image]:
        """Predicted frames in memory, one per row of `actions`."""
        return [PIL.Image.open(BytesIO(each.png)) for each in self._kept]

    @property
    def actions(self) -> np.ndarray:
        """Actions (n, A) of `frames`, raw units."""
        return np.array([each.action for each in self._kept]).reshape(-1, len(self.model.action_space))

    def __len__(self) -> int:
        return len(self._kept)

    def reset(self) -> None:
        """Reset to the initial history."""
        self._kept.clear()
        self._before = self._first  # state before the frames in memory
        self._last_dropped: _Predicted | None = None
        self._memories: deque[tuple[int, Mapping[str, torch.Tensor]]] = deque(maxlen=MAX_MEMORIES)
        self._sync_steering()

    def undo(self, num_frames: int = 1) -> PIL.Image.Image:
        """Remove the last `num_frames` predicted frames, or all frames in memory if there are fewer.

        A model with a memory (see `RolloutState`) starts with an empty one if the new last frame is not the last one of a recent
        call of `step`.

        Returns:
            The new last frame.

        Raises:
            ValueError: If `num_frames` is negative.
        """
        if num_frames < 0:
            raise ValueError(f"`num_frames` must not be negative, got {num_frames}.")
        for _ in range(min(num_frames, len(self._kept))):
            self._kept.pop()
        while self._memories and self._memories[-1][0] > self._num_predicted:
            self._memories.pop()
        self._sync_steering()
        return self.last_frame

    @property
    def last_frame(self) -> PIL.Image.Image:
        """Last predicted frame, or the last history frame if nothing has been predicted."""
        return PIL.Image.open(BytesIO(self._last.png)) if self._last else self.first_frame

    @property
    def _last(self) -> _Predicted | None:
        return self._kept[-1] if self._kept else self._last_dropped

    def drive(self, command: Any, num_frames: int = 1) -> list[PIL.Image.Image]:
        """Predict the next frames under a constant command; see `Steering.action` and `step`.

        Raises:
            ValueError: If the command is invalid, `num_frames` is out of range, or the prediction is not finite.
        """
        if not 1 <= num_frames <= self.max_chunk:
            raise ValueError(f"`num_frames` must be in [1, {self.max_chunk}], got {num_frames}.")
        return self.step([self.steering.action(command) for _ in range(num_frames)])

    @torch.no_grad()
    def step(self, actions: Any) -> list[PIL.Image.Image]:
        """Predict the frames of the next actions.

        Args:
            actions: Actions (n, A) in raw units, n at most `max_chunk`.

        Returns:
            The n predicted frames.

        Raises:
            ValueError: If the actions are not one valid sequence of at most `max_chunk`, or the prediction is not finite; the
                session is then unchanged.
        """
        try:
            return self._predict(actions)
        finally:
            self._sync_steering()  # also after an error, because commands have moved the targets

    def _predict(self, actions: Any) -> list[PIL.Image.Image]:
        checked = self.model.action_space.prepare(actions)
        if len(checked) != 1 or checked.shape[1] > self.max_chunk:
            raise ValueError(
                f"`actions` must be one sequence of at most {self.max_chunk} actions, got {tuple(checked.shape[:2])} (sequences, "
                "actions): split a longer sequence into several calls."
            )
        state = self._state()
        chunks = []
        for after, latents in roll(self.model, state, checked, **self._sampling):
            state = after
            chunks.append(latents)
        future = torch.cat(chunks, dim=2)  # (1, C, n, h, w)
        if not torch.isfinite(future).all():
            raise ValueError("the predicted frames must be finite: check the weights of the checkpoint and its dtype.")
        images = _images(self.model.decode(future)[0])
        self._keep(images, checked[0], future)
        self._memories.append((self._num_predicted, state.memory))
        return images

    @property
    def _num_predicted(self) -> int:
        """Number of frames predicted so far, including those no longer in memory."""
        return int(self._before.step) + len(self._kept)

    def _state(self) -> RolloutState:
        """Return the state after the frames in memory; frames predicted again after `undo` get the same noise."""
        state = self._before
        for each in reversed(list(islice(reversed(self._kept), self._history_length))):
            state = state.append(each.latents, self._history_length)
        number, memory = self._memories[-1] if self._memories else (0, {})
        memory = memory if number == self._num_predicted else {}
        return replace(state, step=self._before.step + len(self._kept), memory=memory)

    @torch.no_grad()
    def append(self, frames: Sequence[PIL.Image.Image], actions: Any) -> None:
        """Append frames that an earlier session predicted, to continue its rollout here.

        Args:
            frames: The n frames, RGB, of the model's frame size.
            actions: The actions (n, A) in raw units that led to them.

        Raises:
            ValueError: If the actions are invalid, their number differs from that of the frames, or a frame has the wrong size. In
                these cases, nothing is appended.
        """
        checked = self.model.action_space.prepare(actions)
        size = self.model.frame_size[::-1]
        if checked.shape[:2] != (1, len(frames)) or any(frame.size != size for frame in frames):
            raise ValueError(
                f"`frames` must be one image of {size[0]}x{size[1]} pixels for each action, got {len(frames)} of "
                f"{sorted({'x'.join(map(str, frame.size)) for frame in frames})} for actions {tuple(checked.shape)}."
            )
        images = [frame.convert("RGB") for frame in frames]
        pixels = np.stack([np.asarray(image) for image in images])[:, None]
        pixels = pixels.repeat(self._first.latents.shape[2], axis=1)  # as many frames as the first history
        latents = self.model.start(pixels, self._first.seeds * len(images)).latents[:, :, -1:]  # (n, C, 1, h, w)
        self._keep(images, checked[0], latents.transpose(0, 2))
        self._sync_steering()

    def _keep(self, frames: Sequence[PIL.Image.Image], actions: torch.Tensor, latents: torch.Tensor) -> None:
        for frame, action, latent in zip(frames, actions, latents.split(1, dim=2), strict=True):
            if len(self._kept) == self._kept.maxlen:
                self._last_dropped = self._kept[0]
                self._before = self._before.append(self._kept[0].latents, self._history_length)
            self._kept.append(_Predicted(_png(frame), action.double().numpy(), latent.clone()))

    def _sync_steering(self) -> None:
        self.steering.continue_from(self._last.action if self._last else None)

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write the recording: an mp4 of n + 1 frames, and a `.npy` of the actions (n, A) next to it.

        Args:
            path: Path of the mp4; another suffix is replaced.

        Returns:
            Paths of both files.

        Raises:
            ValueError: If there are no predicted frames in memory.
        """
        from .data import write_video  # its libraries take seconds to import

        if not self._kept:
            raise ValueError("no frames to save: call `drive` or `step` first.")
        path = Path(path).with_suffix(".mp4")
        before = self._last_dropped
        first = PIL.Image.open(BytesIO(before.png)) if before else self.first_frame
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in (first, *self.frames)])
        write_video(path, frames, self.model.fps or 10)
        with temporary_path(path.with_suffix(".npy")) as partial:
            np.save(partial, self.actions.astype(np.float32))
        return path, path.with_suffix(".npy")


def _finite_vector(name: str, value: Any, size: int) -> np.ndarray:
    """Convert an action or a command to an array (A,), float64; errors name the argument."""
    try:
        return prepare_actions([value], size).reshape(size).double().numpy()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` must be {size} finite numbers, one per action component, got {value!r:.80}."
        ) from error


def _images(frames: torch.Tensor) -> list[PIL.Image.Image]:
    """Convert frames (n, 3, H, W) in [0, 1] to images."""
    pixels = (frames.float() * 255).round().byte().movedim(1, -1).cpu().numpy()
    return [PIL.Image.fromarray(each) for each in pixels]


def _png(image: PIL.Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
