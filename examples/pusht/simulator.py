"""The Push-T simulator (gym-pusht) and random policies for the pusher."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

try:
    import pymunk
    from gym_pusht.envs.pusht import PushTEnv
except ModuleNotFoundError as error:
    from irasim_diffusers.training import exit_without_extra

    exit_without_extra(error, "pusht")

ARENA = 512  # side of the arena, in the units of actions and states
SIZE = 96  # side of an observed frame, in pixels
FPS = 10  # frames per second
PUSHER_RADIUS = 15.0  # radius of the pusher in gym-pusht, arena units
SUCCESS = 0.95  # coverage of the goal above which the task is solved
CENTRE_OF_MASS = np.array([0.0, 45.0])  # of the block, in the block's frame


@dataclass(frozen=True)
class State:
    """Poses of pusher and block after a step or a reset, in arena units and radians."""

    agent: np.ndarray  # (2,)
    block: np.ndarray  # (3,): x, y, angle

    @property
    def block_centre(self) -> np.ndarray:
        """Center of mass of the block (2,)."""
        cos, sin = np.cos(self.block[2]), np.sin(self.block[2])
        return self.block[:2] + np.array([[cos, -sin], [sin, cos]]) @ CENTRE_OF_MASS


Pusher: TypeAlias = Generator[np.ndarray, State, None]  # yields targets (2,), receives the resulting states


class PushT(PushTEnv):
    """gym-pusht's environment with a configurable pusher radius."""

    def __init__(self, pusher_radius: float) -> None:
        super().__init__(obs_type="state")
        self.pusher_radius = pusher_radius

    def add_circle(self, space: pymunk.Space, position: tuple[float, float], radius: float) -> pymunk.Body:
        """Add the pusher with `pusher_radius` instead of `radius`."""
        return super().add_circle(space, position, self.pusher_radius)


class Simulator:
    """gym-pusht without time limit and without an end at success.

    Frames are the observations, because `render()` draws the action into the image.

    Args:
        pusher_radius: Radius of the pusher in arena units, in collisions and in frames.
    """

    def __init__(self, pusher_radius: float = PUSHER_RADIUS) -> None:
        if not 0 < pusher_radius <= ARENA / 4:
            raise ValueError(
                f"`pusher_radius` must be greater than 0 and at most {ARENA // 4}, got {pusher_radius:g}."
            )
        self.environment: Any = PushT(pusher_radius)

    def reset(self, seed: int) -> State:
        """Start the episode with the given seed."""
        _, info = self.environment.reset(seed=seed)
        return State(info["pos_agent"], info["block_pose"])

    def step(self, action: np.ndarray) -> State:
        """Move the pusher toward the target `action` (2,), in [0, 512], for a tenth of a second."""
        *_, info = self.environment.step(np.asarray(action, dtype=np.float64))
        return State(info["pos_agent"], info["block_pose"])

    def frame(self) -> np.ndarray:
        """Return the observed frame (96, 96, 3), uint8."""
        self.environment.obs_type = "pixels"
        try:
            return self.environment.get_obs()
        finally:
            self.environment.obs_type = "state"

    @property
    def coverage(self) -> float:
        """Fraction of the goal that the block covers; the task is solved above `SUCCESS`."""
        return float(self.environment._get_coverage())

    def physics(self) -> np.ndarray:
        """Return the complete state (10,): pusher position and velocity, block pose and velocities."""
        agent, block = self.environment.agent, self.environment.block
        values = [*agent.position, *agent.velocity, *block.position, block.angle, *block.velocity]
        return np.array([*values, block.angular_velocity])

    def restore(self, physics: np.ndarray) -> None:
        """Restore a state from `physics`; call `reset` first."""
        agent, block, space = self.environment.agent, self.environment.block, self.environment.space
        values = [float(value) for value in physics]
        agent.position, agent.velocity = tuple(values[:2]), tuple(values[2:4])
        block.angle = values[6]  # set first: the rotation about the center of mass moves the origin
        block.position, block.velocity, block.angular_velocity = tuple(values[4:6]), tuple(values[7:9]), values[9]
        for body in (agent, block):
            space.reindex_shapes_for_body(body)

    def replay(self, seed: int, actions: np.ndarray, first_frame: int = 0) -> tuple[np.ndarray, list[State]]:
        """Run `actions` (n, 2) from the start of episode `seed`.

        Returns:
            Frames (n + 1 - first_frame, 96, 96, 3) and all n + 1 states.
        """
        states = [self.reset(seed)]
        frames = [self.frame()] if first_frame == 0 else []
        for index, action in enumerate(actions, 1):
            states.append(self.step(action))
            if index >= first_frame:
                frames.append(self.frame())
        return np.stack(frames), states


def push_about(rng: np.random.Generator, state: State) -> Pusher:
    """Yield targets that explore contact with the block; send each new `State` back.

    Each stroke moves along a line that passes the block's center at a random offset: small offsets push the block, medium
    offsets rotate it or slide off, large ones miss. Strokes lead toward the inner arena, so that the block rarely gets
    stuck in a corner. In 20 % of cases, the pusher wanders or waits instead.
    """
    while True:
        draw = rng.random()
        if draw < 0.15:
            waypoints = [rng.uniform(20, ARENA - 20, 2) for _ in range(rng.integers(1, 3))]
        elif draw < 0.20:
            waypoints = [state.agent] * int(rng.integers(2, 6))
        else:
            waypoints = _stroke(rng, state)
        speed = rng.uniform(8, 45)  # advance of the target per step; 20 is 200 units per second
        jitter = rng.choice([0.0, 2.0, 6.0])
        target = state.agent
        for waypoint in waypoints:
            for _ in range(60):
                offset = waypoint - target
                distance = float(np.linalg.norm(offset))
                target = waypoint if distance <= speed else target + offset * (speed / distance)
                state = yield np.clip(target + rng.normal(0, jitter, 2), 12, ARENA - 12).astype(np.float32)
                if distance <= speed:
                    break


def hold_keys(rng: np.random.Generator, state: State) -> Pusher:
    """Yield the targets of simulated arrow keys; send each new `State` back.

    The keys move the target in one of 8 directions, or not at all, for several steps. As in the Space, the target starts at
    the pusher, moves relative to its last position, and stays within the arena. Half of the directions point toward
    the block. The speed changes with every second choice of keys on average; 32 arena units per step correspond to
    speed 1 in the Space.
    """
    target, speed = state.agent.astype(np.float64), rng.uniform(4, 64)
    while True:
        if rng.random() < 0.5:
            speed = rng.choice([8.0, 16.0, 32.0, rng.uniform(4, 64)])
        direction = rng.integers(-1, 2, 2)
        if rng.random() < 0.5:  # one or two keys that lead to the block
            offset = state.block_centre - state.agent
            direction = np.sign(np.where(np.abs(offset) > rng.uniform(0, 60), offset, 0)).astype(int)
        for _ in range(1 + rng.geometric(0.12)):
            target = np.clip(target + speed * direction, 0, ARENA)
            state = yield target.astype(np.float32)


def jump_to_targets(rng: np.random.Generator, state: State) -> Pusher:
    """Yield targets anywhere in the arena, also at edges, corners, block or pusher, each for some steps."""
    while True:
        draw = rng.random()
        target = rng.uniform(0, ARENA, 2)
        if draw < 0.25:  # an edge, or a corner
            edge = rng.random(2) < 0.6
            target = np.where(edge, rng.choice([0.0, ARENA], 2), target)
        elif draw < 0.5:
            target = np.clip(state.block_centre + rng.normal(0, 40, 2), 0, ARENA)
        elif draw < 0.6:
            target = state.agent
        for _ in range(1 + rng.geometric(0.15)):
            state = yield target.astype(np.float32)


def _stroke(rng: np.random.Generator, state: State) -> list[np.ndarray]:
    """Return waypoints around the block to a start behind it, then through it toward the inner arena."""
    center = state.block_centre
    for _ in range(20):
        goal = rng.uniform(130, ARENA - 130, 2)
        angle = np.arctan2(*(goal - center)[::-1]) + rng.normal(0, 0.4)
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        line = center + across * rng.normal(0, 40)
        start = line - along * rng.uniform(85, 115)
        if np.all((start > 15) & (start < ARENA - 15)):
            break
    else:
        return [rng.uniform(20, ARENA - 20, 2)]
    finish = np.clip(line + along * rng.uniform(-20, 110), 15, ARENA - 15)
    return [*_way_round(center, state.agent, start), start, finish]


def _way_round(center: np.ndarray, here: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
    """Return waypoints on a circle around the block, from the side of `here` to the side of `there`."""
    first = np.arctan2(*(here - center)[::-1])
    turn = (np.arctan2(*(there - center)[::-1]) - first + np.pi) % (2 * np.pi) - np.pi
    angles = first + turn * np.linspace(0, 1, 2 + int(abs(turn) / 0.7))[1:-1]
    points = center + 112 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return list(np.clip(points, 15, ARENA - 15))


def push_at(rng: np.random.Generator, state: State) -> Pusher:
    """Yield targets on a straight line from the pusher through the block, at a random offset and speed."""
    aim = state.block_centre + rng.normal(0, 30, 2)
    along = aim - state.agent
    along = along / max(float(np.linalg.norm(along)), 1e-6)
    speed = rng.uniform(8, 45)
    jitter = rng.choice([0.0, 2.0, 6.0])
    target = state.agent
    while True:
        target = np.clip(target + along * speed, 12, ARENA - 12)
        yield np.clip(target + rng.normal(0, jitter, 2), 12, ARENA - 12).astype(np.float32)
