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
    visitor: str
    last_used: float = 0.0
    busy: bool = False
    ended: bool = False  # while busy: its place is taken until the work is done


class Sessions:
    """The rollouts under way.

    Args:
        most: Sessions at a time; a further one is refused.
        idle_seconds: A session that nothing was asked of for so long is freed.
        bytes_each: Memory that the frames of a session take at most.
        most_each: Sessions of one visitor at a time.
    """

    def __init__(
        self, most: int = 32, idle_seconds: float = 120.0, bytes_each: int = 64_000_000, most_each: int = 16
    ) -> None:
        self.most = most
        self.most_each = most_each
        self.idle_seconds = idle_seconds
        self.bytes_each = bytes_each
        self._drives: dict[str, Drive] = {}
        self._opening: list[str] = []  # visitors whose sessions are being made
        self._sweeper: asyncio.Task | None = None

    def __len__(self) -> int:
        return len(self._drives)

    def max_frames(self, world: World) -> int:
        """Frames that a session of this model may keep: pictures that do not compress, and their latents."""
        height, width = world.pipeline.frame_size
        config = world.pipeline.transformer.config
        latents = 4 * config.in_channels * config.sample_height * config.sample_width
        return max(1, self.bytes_each // (3 * height * width + latents))

    async def open(self, world: World, make: Callable[[], DrivingSession], visitor: str = "") -> str:
        """Make a visitor's session when it is its turn; its name.

        Raises:
            ValueError: If all places are taken, in all or by this visitor, or the session cannot be made.
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
            self._sweeper = asyncio.create_task(self._sweep_on())
        return name

    @contextmanager
    def use(self, name: object) -> Iterator[Drive]:
        """A session, for as long as one request takes.

        Raises:
            ValueError: If there is no such session, or its last request is not answered yet.
        """
        drive = self._drives.get(name) if isinstance(name, str) else None
        if drive is None or drive.ended:
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
            if drive.ended:
                del self._drives[str(name)]

    def close(self, name: object) -> bool:
        """End a session, once its last request is answered; whether there was one."""
        drive = self._drives.get(name) if isinstance(name, str) else None
        if drive is None or drive.ended:
            return False
        drive.ended = True
        if not drive.busy:
            del self._drives[str(name)]
        return True

    def sweep(self) -> None:
        """Free the sessions that have been idle for too long."""
        oldest = time.monotonic() - self.idle_seconds
        for name, drive in list(self._drives.items()):
            if drive.last_used < oldest and not drive.busy:
                del self._drives[name]

    def _check_places(self, visitor: str) -> None:
        visitors = [*self._opening, *(drive.visitor for drive in self._drives.values())]
        if visitors.count(visitor) >= self.most_each:
            raise ValueError(
                f"all {self.most_each} places of a visitor are taken: end a session of yours, or wait until it has been idle "
                f"for {self.idle_seconds:g} seconds."
            )
        if len(visitors) >= self.most:
            raise ValueError(
                f"all {self.most} places are taken: try again in a minute, or run the Space yourself, "
                "`python spaces/app.py`."
            )

    async def _sweep_on(self) -> None:
        """Look for idle sessions until there is none left at all."""
        while self._drives:
            await asyncio.sleep(max(0.2, self.idle_seconds / 8))
            self.sweep()
