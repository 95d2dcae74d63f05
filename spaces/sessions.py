"""Who is driving: sessions with names that cannot be guessed, bounded in number and memory, freed when idle."""

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
    last_used: float = 0.0
    busy: bool = False


class Sessions:
    """The rollouts under way.

    Args:
        most: Sessions at a time; a further one is refused.
        idle_seconds: A session that nothing was asked of for so long is freed.
        bytes_each: Memory that the frames of a session take at most.
    """

    def __init__(self, most: int = 32, idle_seconds: float = 120.0, bytes_each: int = 64_000_000) -> None:
        self.most = most
        self.idle_seconds = idle_seconds
        self.bytes_each = bytes_each
        self._drives: dict[str, Drive] = {}
        self._sweeper: asyncio.Task | None = None

    def __len__(self) -> int:
        return len(self._drives)

    def max_frames(self, world: World) -> int:
        """Frames that a session of this model may keep: pictures that do not compress, and their latents."""
        height, width = world.pipeline.frame_size
        config = world.pipeline.transformer.config
        latents = 4 * config.in_channels * config.sample_height * config.sample_width
        return max(1, self.bytes_each // (3 * height * width + latents))

    async def open(self, world: World, make: Callable[[], DrivingSession]) -> str:
        """Make a session when it is its turn; its name.

        Raises:
            ValueError: If all places are taken, or the session cannot be made.
        """
        self.sweep()
        self._check_places()
        session = await world.run(make)
        self._check_places()  # others may have come while this one waited
        name = secrets.token_urlsafe(16)
        self._drives[name] = Drive(world, session, time.monotonic())
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep_on())
        return name

    @contextmanager
    def use(self, name: object) -> Iterator[Drive]:
        """A session, for as long as one request takes.

        Raises:
            ValueError: If there is no such session, or its last request is not answered yet.
        """
        drive = self._drives.get(name) if isinstance(name, str) else None
        if drive is None:
            raise ValueError(
                "`session` must be one that `start` gave, got none of these: it has ended or was idle; start anew."
            )
        if drive.busy:
            raise ValueError("`session` is still at its last request: wait for the answer, then ask again.")
        drive.busy = True
        try:
            yield drive
        finally:
            drive.busy, drive.last_used = False, time.monotonic()

    def close(self, name: object) -> bool:
        """End a session; whether there was one."""
        return isinstance(name, str) and self._drives.pop(name, None) is not None

    def sweep(self) -> None:
        """Free the sessions that have been idle for too long."""
        oldest = time.monotonic() - self.idle_seconds
        for name, drive in list(self._drives.items()):
            if drive.last_used < oldest and not drive.busy:
                del self._drives[name]

    def _check_places(self) -> None:
        if len(self) >= self.most:
            raise ValueError(
                f"all {self.most} places are taken: try again in a minute, or run the Space yourself, "
                "`python spaces/app.py`."
            )

    async def _sweep_on(self) -> None:
        """Look for idle sessions until there is none left at all."""
        while self._drives:
            await asyncio.sleep(max(0.2, self.idle_seconds / 8))
            self.sweep()
