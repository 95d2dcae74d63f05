"""API of the Space: actions in, frames out. The Drive page and other devices use it.

Endpoints bypass Gradio's queue: a session has one request at a time, and a model processes requests in order of arrival.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from sessions import Sessions
from uploads import data_url, read_data_url, uploaded_path
from visitor_files import read_picture
from worlds import World, Worlds

from irasim_diffusers import ActionSpace, DrivingSession, Steering
from irasim_diffusers.commands import SAME_KEYS, key_controls

MAX_RESTORED = 64  # frames per request


def add_endpoints(worlds: Worlds, sessions: Sessions) -> None:
    """Add the endpoints to the current Blocks."""
    api = Endpoints(worlds, sessions)
    for endpoint in (api.start, api.step, api.drive, api.restore, api.undo, api.reset, api.record, api.stop):
        gr.api(_with_messages(endpoint), api_name=endpoint.__name__, queue=False, concurrency_limit=None)


class Endpoints:
    """The endpoints of the API, one method each.

    Invalid arguments raise ValueError, whose message the client receives.

    Args:
        worlds: The models.
        sessions: The sessions of all visitors.
    """

    def __init__(self, worlds: Worlds, sessions: Sessions) -> None:
        self.worlds = worlds
        self.sessions = sessions

    async def start(
        self, request: gr.Request, model: str, frames: Any, start: Any = None, seed: int = 0
    ) -> tuple[str, str, dict]:
        """Start a rollout.

        Args:
            request: The visitor's request.
            model: Name of a model.
            frames: Name of an example, or an uploaded image (`gradio_client.handle_file`).
            start: Action at the robot's position, raw units; None for that of the example if known, else the middle of a bounded
                absolute space, or zero in a relative space.
            seed: Seed of the noise.

        Returns:
            Name of the session, the first frame as a data URL, and a description of the action space and the session's limits.
        """
        world = self.worlds.named(model)
        seed = _whole_number("seed", seed, 0, 2**32 - 1)
        session = await self.sessions.open(
            world, lambda: _new_session(world, frames, start, seed, self.sessions.max_frames(world)), address(request)
        )
        with self.sessions.use(session) as driven:
            limits = {"max_frames": self.sessions.max_frames(world), "idle_seconds": self.sessions.idle_seconds}
            first = data_url(driven.session.first_frame)
            return session, first, describe_space(world.pipeline.transformer.config, driven.session.steering) | limits

    async def step(self, session: str, actions: Any) -> list[str]:
        """Predict one frame, as a lossless WebP data URL, for each of the next actions (n, A) in raw units."""
        with self.sessions.use(session) as driven:
            _check_lengths(actions, driven.session.max_chunk)
            return await driven.world.run(lambda: [data_url(frame) for frame in driven.session.step(actions)])

    async def drive(
        self, session: str, command: Any, frames: int = 1, speed: float = 1.0
    ) -> tuple[list[str], list[list[float]]]:
        """Predict the next frames for a command (A,) in [-1, 1]; a command of zeros gives the hold action.

        The motion per frame is proportional to `speed`, in (0, 10]. At most 16 frames are predicted.

        Returns:
            A data URL for each frame, and the resulting actions (n, A).
        """
        with self.sessions.use(session) as driven:
            number = _whole_number("frames", frames, 1, driven.session.max_chunk)
            if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 < speed <= 10:
                raise ValueError(f"`speed` must be in (0, 10], got {speed!r}.")
            return await driven.world.run(_drive, driven.session, command, number, speed)

    async def restore(self, session: str, frames: Any, actions: Any) -> int:
        """Append frames that an ended session predicted, to continue its rollout.

        Args:
            session: A new session from the same start.
            frames: At most 64 data URLs from `step` or `drive`, in order; send further frames in another request.
            actions: Their actions (n, A), raw units.

        Returns:
            The number of frames of the session.
        """
        with self.sessions.use(session) as driven:
            if not isinstance(frames, list) or not 1 <= len(frames) <= MAX_RESTORED:
                raise ValueError(f"`frames` must be a list of 1 to {MAX_RESTORED} data URLs.")
            _check_lengths(actions, MAX_RESTORED)
            await driven.world.run(_restore, driven.session, frames, actions)
            return len(driven.session)

    async def undo(self, session: str, frames: int = 1) -> tuple[str, int]:
        """Remove the last frames; return the last remaining frame and the number of remaining frames."""
        with self.sessions.use(session) as driven:
            number = _whole_number("frames", frames, 0, 10**6)
            return data_url(driven.session.undo(number)), len(driven.session)

    async def reset(self, session: str) -> str:
        """Reset the session to its start, and return the start frame."""
        with self.sessions.use(session) as driven:
            driven.session.reset()
            return data_url(driven.session.first_frame)

    async def record(self, session: str) -> tuple[gr.FileData, gr.FileData]:
        """Return the recording: an mp4 of n + 1 frames, and a `.npy` of the actions (n, A) in raw units."""
        with self.sessions.use(session) as driven:
            folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
            # runs in another thread so that other sessions are not blocked; the session is reserved for this request
            video, actions = await asyncio.to_thread(driven.session.save, folder / "drive.mp4")
            return gr.FileData(path=str(video)), gr.FileData(path=str(actions))

    async def stop(self, session: str) -> bool:
        """End the session; return whether it existed."""
        return self.sessions.close(session)


def describe_space(config: Any, steering: Steering | None = None) -> dict[str, Any]:
    """Describe a checkpoint's action space and its controls in JSON-serializable values."""
    if steering is None:
        space = ActionSpace.from_config(config)
        steering = Steering(space, start=_middle(space) or np.zeros(len(space)))
    space = steering.action_space
    return {
        "names": list(space.names),
        "units": config.action_units,
        "low": _numbers(space.low),
        "high": _numbers(space.high),
        "space": space.kind,
        "derivation": space.derivation,
        "fps": config.fps or 10,
        "hold": _numbers(steering.hold()),  # in an absolute space, the last action
        "step": _numbers(steering.step),  # motion per frame for a command of 1 at speed 1
        "max_chunk": DrivingSession.max_chunk,
        "controls": [vars(control) for control in key_controls(space)],
        "same_keys": SAME_KEYS,
    }


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Convert to JSON numbers; non-finite values become None."""
    return [float(value) if np.isfinite(value) else None for value in values]


def address(request: gr.Request) -> str:
    """Return a visitor's address; empty if unknown.

    It comes from `X-Forwarded-For` only if uvicorn trusts the proxy; see `app.trust_proxy`.
    """
    return request.client.host if request.client else ""


def _check_lengths(actions: Any, most: int) -> None:
    """Check the number of actions before conversion.

    Raises:
        ValueError: If there are more than `most` actions.
    """
    if isinstance(actions, list) and len(actions) > most:
        raise ValueError(
            f"`actions` must be one sequence of at most {most}, got {len(actions)}: send the rest in another request."
        )


def _new_session(world: World, frames: Any, start: Any, seed: int, max_frames: int) -> DrivingSession:
    if isinstance(frames, str):
        if frames not in world.starts:
            wanted = f"an upload or one of {', '.join(world.starts)}" if world.starts else "an upload"
            raise ValueError(f"`frames` must be {wanted}, got {frames!r}.")
        history = world.starts[frames].frames
        start = world.starts[frames].action if start is None else start
    else:
        history = read_picture(uploaded_path(frames), world.pipeline.frame_size)[None]
    steering = Steering(
        world.pipeline.action_space, start=_middle(world.pipeline.action_space) if start is None else start
    )
    return DrivingSession(world.pipeline, history, steering, seed, max_frames)


def _middle(space: ActionSpace) -> list[float] | None:
    """Return the middle of a bounded absolute space; None for other spaces.

    A robot whose position is unknown is assumed to start there.
    """
    middle = np.mean([space.low, space.high], axis=0) if space.kind == "absolute" else np.array(np.nan)
    return middle.tolist() if np.isfinite(middle).all() else None


def _drive(session: DrivingSession, command: Any, number: int, speed: float) -> tuple[list[str], list[list[float]]]:
    steering = session.steering
    steering.speed = speed
    actions = [steering.action(command) for _ in range(number)]
    return [data_url(frame) for frame in session.step(actions)], [action.tolist() for action in actions]


def _restore(session: DrivingSession, frames: list[Any], actions: Any) -> None:
    session.append([read_data_url(frame, session.model.frame_size) for frame in frames], actions)


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e12
    if not whole or int(value) != value or not low <= value <= high:
        raise ValueError(f"`{name}` must be a whole number in [{low}, {high}], got {str(value)[:40]}.")
    return int(value)


def _with_messages(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap an endpoint so that the client receives the message of a ValueError.

    Other exceptions are logged, and the client receives 'Internal error'.
    """

    @wraps(endpoint)
    async def answer(*arguments: Any, **named: Any) -> Any:
        try:
            return await endpoint(*arguments, **named)
        except ValueError as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

    return answer
