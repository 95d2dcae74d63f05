"""Driving sessions of visitors, with random names and limits on number, memory and idle time."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from worlds import World

from irasim_diffusers import DrivingSession


@dataclass
class Drive:
    """One visitor's rollout."""

    world: World
    session: DrivingSession
    visitor: str
    last_used: float = 0.0
    busy: bool = False
    ended: bool = False  # if busy, the session still counts until its request is done


class Sessions:
    """All driving sessions.

    Args:
        most: Maximum number of sessions; `open` raises an error beyond it.
        idle_seconds: A session without requests for this long is deleted.
        bytes_each: Maximum memory of the frames of a session.
        most_each: Maximum number of sessions of one visitor.
    """

    def __init__(
        self, most: int = 32, idle_seconds: float = 120.0, bytes_each: int = 64_000_000, most_each: int = 16
    ) -> None:
        self.most = most
        self.most_each = most_each
        self.idle_seconds = idle_seconds
        self.bytes_each = bytes_each
        self._drives: dict[str, Drive] = {}
        self._opening: list[str] = []  # visitors of the sessions that are being created
        self._sweeper: asyncio.Task | None = None

    def __len__(self) -> int:
        return len(self._drives)

    def max_frames(self, world: World) -> int:
        """Return the maximum number of frames in a session of this model, for incompressible images."""
        height, width = world.pipeline.frame_size
        config = world.pipeline.transformer.config
        latents = 4 * config.in_channels * config.sample_height * config.sample_width
        return max(1, self.bytes_each // (3 * height * width + latents))

    async def open(self, world: World, make: Callable[[], DrivingSession], visitor: str = "") -> str:
        """Create a session in the model's thread and return its name.

        Raises:
            ValueError: If the visitor or all visitors together have too many sessions, or the session cannot be created.
        """
        self.sweep()
        self._check_places(visitor)
        self._opening.append(visitor)
        try:
            session = await world.run(make)
        finally:
            self._opening.remove(visitor)
        name = secrets.token_urlsafe(16)
        self._drives[name] = Drive(world, session, visitor, time.monotonic())
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep_regularly())
        return name

    @contextmanager
    def use(self, name: object) -> Iterator[Drive]:
        """Reserve a session for one request.

        Raises:
            ValueError: If the session does not exist, or another request uses it.
        """
        drive = self._drives.get(name) if isinstance(name, str) else None
        if drive is None or drive.ended:
            raise ValueError(
                "`session` must be a name that `start` returned, got another value: the session has ended or was idle; "
                "start a new one."
            )
        if drive.busy:
            raise ValueError("another request of this session is running: wait for its response.")
        drive.busy = True
        try:
            yield drive
        finally:
            drive.busy, drive.last_used = False, time.monotonic()
            if drive.ended:
                del self._drives[str(name)]

    def close(self, name: object) -> bool:
        """End a session as soon as its current request is done; return whether it existed."""
        drive = self._drives.get(name) if isinstance(name, str) else None
        if drive is None or drive.ended:
            return False
        drive.ended = True
        if not drive.busy:
            del self._drives[str(name)]
        return True

    def sweep(self) -> None:
        """Delete idle sessions."""
        oldest = time.monotonic() - self.idle_seconds
        for name, drive in list(self._drives.items()):
            if drive.last_used < oldest and not drive.busy:
                del self._drives[name]

    def _check_places(self, visitor: str) -> None:
        visitors = [*self._opening, *(drive.visitor for drive in self._drives.values())]
        if visitors.count(visitor) >= self.most_each:
            raise ValueError(
                f"this address already has {self.most_each} sessions (the maximum): end one of them, or wait until one has been "
                f"idle for {self.idle_seconds:g} seconds."
            )
        if len(visitors) >= self.most:
            raise ValueError(
                f"all {self.most} sessions are in use: try again in a minute, or run the Space yourself, "
                "`python spaces/app.py`."
            )

    async def _sweep_regularly(self) -> None:
        """Delete idle sessions until no session exists."""
        while self._drives:
            await asyncio.sleep(max(0.2, self.idle_seconds / 8))
            self.sweep()
