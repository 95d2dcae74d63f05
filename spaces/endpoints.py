"""What any device can ask of the Space: actions in, frames out. The Drive page is one such device.

Endpoints take no place in Gradio's queue: a session has one request at a time, and a model serves its sessions in turn.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from sessions import Sessions
from uploads import data_url, uploaded_path
from visitor_files import read_picture
from worlds import World, Worlds

from irasim_diffusers import DrivingSession, Steering
from irasim_diffusers.commands.keys import SAME_KEYS, key_controls


def add_endpoints(worlds: Worlds, sessions: Sessions) -> None:
    """Add the endpoints to the app under construction."""

    async def start(
        request: gr.Request, model: str, frames: Any, start: Any = None, seed: int = 0
    ) -> tuple[str, str, dict]:
        """Begin a rollout.

        Args:
            request: Whose rollout it is.
            model: Name of a model.
            frames: Name of an example, or an uploaded picture (`gradio_client.handle_file`).
            start: Action where the robot is, in raw units; None for the example's, or the middle of a bounded space.
            seed: Of the noise.

        Returns:
            Name of the session, the first frame as a data URL, and the action space.
        """
        world = worlds.named(model)
        seed = _whole_number("seed", seed, 0, 2**32 - 1)
        session = await sessions.open(
            world, lambda: _new_session(world, frames, start, seed, sessions.max_frames(world)), address(request)
        )
        with sessions.use(session) as driven:
            limits = {"max_frames": sessions.max_frames(world), "idle_seconds": sessions.idle_seconds}
            first = data_url(driven.session.first_frame)
            return session, first, describe_space(world.pipeline.transformer.config, driven.session.steering) | limits

    async def step(session: str, actions: Any) -> list[str]:
        """Predict the frames of the next actions (n, A), raw units: a data URL (WebP, lossless) for each."""
        with sessions.use(session) as driven:
            return await driven.world.run(lambda: [data_url(frame) for frame in driven.session.step(actions)])

    async def drive(
        session: str, command: Any, frames: int = 1, speed: float = 1.0
    ) -> tuple[list[str], list[list[float]]]:
        """Predict the next frames under a command (A,) in [-1, 1]; zero holds.

        Returns:
            A data URL for each frame, and the actions (n, A) that the command became.
        """
        with sessions.use(session) as driven:
            number = _whole_number("frames", frames, 1, driven.session.longest_step)
            if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 < speed <= 10:
                raise ValueError(f"`speed` must be in (0, 10], got {speed!r}.")
            return await driven.world.run(_drive, driven.session, command, number, speed)

    async def undo(session: str, frames: int = 1) -> tuple[str, int]:
        """Take frames back; the frame that is the last one now, and how many are left."""
        with sessions.use(session) as driven:
            number = _whole_number("frames", frames, 0, 10**6)
            return data_url(driven.session.undo(number)), len(driven.session)

    async def reset(session: str) -> str:
        """Begin anew from the same start; its frame."""
        with sessions.use(session) as driven:
            driven.session.reset()
            return data_url(driven.session.first_frame)

    async def record(session: str) -> tuple[gr.FileData, gr.FileData]:
        """The recording: mp4 of the first frame and those predicted, and a `.npy` of the actions (n, A), raw units."""
        with sessions.use(session) as driven:
            folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
            # in no turn of the model's: the session is kept by this request, and others drive on meanwhile
            video, actions = await asyncio.to_thread(driven.session.save, folder / "drive.mp4")
            return gr.FileData(path=str(video)), gr.FileData(path=str(actions))

    async def stop(session: str) -> bool:
        """End the session; whether there was one."""
        return sessions.close(session)

    for endpoint in (start, step, drive, undo, reset, record, stop):
        gr.api(_told(endpoint), api_name=endpoint.__name__, queue=False, concurrency_limit=None)


def describe_space(config: Any, steering: Steering | None = None) -> dict[str, Any]:
    """A checkpoint's action space, and what a page needs to steer in it; for JSON."""
    if steering is None:
        steering = Steering(config, start=_middle(config) or np.zeros(config.action_dim))
    return {
        "names": steering.names,
        "units": config.action_units,
        "low": _numbers(steering.low),
        "high": _numbers(steering.high),
        "space": steering.space,
        "derivation": steering.derivation,
        "fps": config.fps or 10,
        "hold": _numbers(steering.hold()),  # in an absolute space the last action holds
        "step": _numbers(steering.step),  # of a command of 1 at speed 1
        "longest_step": DrivingSession.longest_step,
        "controls": [vars(control) for control in key_controls(steering.action_space)],
        "same_keys": SAME_KEYS,
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON, which knows no infinity."""
    return [float(value) if np.isfinite(value) else None for value in values]


def address(request: gr.Request) -> str:
    """Where a visitor comes from, as a proxy in front of the Space tells it."""
    forwarded = request.headers.get("x-forwarded-for", "").split(",")[0].strip()
    return forwarded or (request.client.host if request.client else "")


def _new_session(world: World, frames: Any, start: Any, seed: int, max_frames: int) -> DrivingSession:
    config = world.pipeline.transformer.config
    if isinstance(frames, str):
        if frames not in world.starts:
            raise ValueError(f"`frames` must be an upload or one of {', '.join(world.starts)}, got {frames!r}.")
        history = world.starts[frames].frames
        start = world.starts[frames].action if start is None else start
    else:
        history = read_picture(uploaded_path(frames), world.pipeline.frame_size)[None]
    steering = Steering(config, start=_middle(config) if start is None else start)
    return DrivingSession(world.pipeline, history, steering, seed, max_frames)


def _middle(config: Any) -> list[float] | None:
    """The middle of an absolute space that is bounded, to begin from where nobody says where the robot is."""
    if config.action_space != "absolute" or config.action_low is None or config.action_high is None:
        return None
    bounds = np.array([config.action_low, config.action_high], dtype=np.float64).reshape(2, -1)
    middle = np.broadcast_to(bounds.mean(axis=0), config.action_dim)
    return middle.tolist() if np.isfinite(middle).all() else None


def _drive(session: DrivingSession, command: Any, number: int, speed: float) -> tuple[list[str], list[list[float]]]:
    steering = session.steering
    steering.speed = speed
    actions = [steering.action(command) for _ in range(number)]
    return [data_url(frame) for frame in session.step(actions)], [action.tolist() for action in actions]


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e12
    if not whole or int(value) != value or not low <= value <= high:
        raise ValueError(f"`{name}` must be a whole number in [{low}, {high}], got {str(value)[:40]}.")
    return int(value)


def _told(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The endpoint, whose refusals reach the client; what else fails is logged and told as 'Internal error'."""

    @wraps(endpoint)
    async def answer(*arguments: Any, **named: Any) -> Any:
        try:
            return await endpoint(*arguments, **named)
        except ValueError as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

    return answer
