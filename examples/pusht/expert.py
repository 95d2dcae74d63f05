"""A scripted expert for Push-T that simulates short pushes and executes the best one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from simulator import ARENA, Pusher, State

try:
    import pymunk
    import shapely
    from gym_pusht.envs.pusht import PushTEnv
except ModuleNotFoundError as error:
    from irasim_diffusers.training import exit_without_extra

    exit_without_extra(error, "pusht")

GOAL = np.array([256.0, 256.0, np.pi / 4])  # pose of the goal: x, y, angle
REACH = 18.0  # distance between the pusher's center and the block before a push, in arena units
OUTLINE = np.array([[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], dtype=float)
SPEEDS = {"far": (6.0, 14.0), "near": (2.5, 7.0)}  # advance of the target per step
SPACING = {"far": 15.0, "near": 9.0}  # distance between the start points of pushes
LONGEST = 12  # maximum length of a push in steps
STEP_COST = 0.25  # cost of a step, as a distance of the block from the goal in arena units
WALK = 20.0  # advance of the target per step between pushes


class Lookahead:
    """Physics of the environment without rendering, which can start from any state."""

    def __init__(self) -> None:
        self.space = pymunk.Space()
        self.space.damping = 0.0
        corners = [(5, 506), (5, 5), (506, 5), (506, 506), (5, 506)]
        walls = [PushTEnv.add_segment(self.space, a, b, 2) for a, b in itertools.pairwise(corners)]
        self.space.add(*walls)
        self.agent = PushTEnv.add_circle(self.space, (256, 400), 15)
        self.block, _ = PushTEnv.add_tee(self.space, (256, 300), 0)

    def run(self, start: np.ndarray, block: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the block poses (n, 3) after each of the targets (n, 2).

        The pusher at `start` (2,) and the block at pose `block` (3,) are initially at rest.
        """
        self.agent.position, self.agent.velocity = tuple(start), (0, 0)
        self.block.angle = block[2]  # set first: the rotation about the center of mass moves the origin
        self.block.position = tuple(block[:2])
        self.block.velocity, self.block.angular_velocity = (0, 0), 0
        self.space.reindex_shapes_for_body(self.block)
        self.space.reindex_shapes_for_body(self.agent)
        poses = np.empty((len(targets), 3))
        for index, (x, y) in enumerate(targets.tolist()):
            for _ in range(10):
                position, velocity = self.agent.position, self.agent.velocity
                self.agent.velocity = (
                    velocity.x + (100 * (x - position.x) - 20 * velocity.x) * 0.01,
                    velocity.y + (100 * (y - position.y) - 20 * velocity.y) * 0.01,
                )
                self.space.step(0.01)
            poses[index] = (*self.block.position, self.block.angle)
        return poses


def outline(poses: np.ndarray) -> np.ndarray:
    """Return the corners (..., 8, 2) of blocks at poses (..., 3)."""
    cos, sin = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    turn = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)  # for multiplication from the right
    return poses[..., None, :2] + OUTLINE @ turn


def distance_to_goal(poses: np.ndarray) -> np.ndarray:
    """Return the mean distance of the corners of blocks (..., 3) from their goal positions, arena units."""
    return np.linalg.norm(outline(poses) - outline(GOAL), axis=-1).mean(-1)


def ious(blocks: np.ndarray) -> np.ndarray:
    """Return the intersection over union (N,) of the goal and blocks at poses (N, 3)."""
    goal = shapely.Polygon(outline(GOAL))
    shapes = shapely.polygons(outline(blocks))
    overlap = shapely.area(shapely.intersection(shapes, goal))
    return overlap / (2 * goal.area - overlap)


def coverage(iou: Any) -> Any:
    """Convert the IoU of block and goal, which have the same area, to the covered fraction of the goal."""
    return 2 * iou / (1 + iou)


def push_to_goal(rng: np.random.Generator, state: State, noise: float = 0.0) -> Pusher:
    """Yield the targets of an expert that pushes the block to the goal; send each new `State` back.

    Before each push, the expert simulates a few hundred pushes from points around the block, in three directions and at two
    speeds. It chooses one of the best by remaining distance and number of steps. If no push helps, the pusher moves away from
    the block; at the goal, it waits.

    Args:
        rng: Generator for the choice among nearly equal pushes and for the noise.
        state: Initial state.
        noise: Standard deviation of the noise on each target, in arena units.
    """
    lookahead = Lookahead()
    patience = 0.0  # grows while the distance does not decrease, so that worse pushes are accepted
    while True:
        before = distance_to_goal(state.block)
        targets = [state.agent] if before < 2.0 else _best_push(lookahead, rng, state, patience) or _wander(rng, state)
        for target in targets:
            state = yield np.clip(target + rng.normal(0, noise, 2) * (noise > 0), 12, ARENA - 12).astype(np.float32)
        patience = 0.0 if distance_to_goal(state.block) < before - 0.5 else min(patience + 2.0, 20.0)


def _best_push(lookahead: Lookahead, rng: np.random.Generator, state: State, patience: float) -> list[np.ndarray]:
    """Return the targets of the path to the best push and of the push itself; empty if no push helps."""
    here = distance_to_goal(state.block)
    reach = "near" if here < 12 else "far"
    obstacle = shapely.Polygon(outline(state.block)).buffer(REACH - 1.5, join_style="mitre")
    best: list[tuple[float, np.ndarray, np.ndarray]] = []
    for start, targets in _pushes(rng, state.block, SPACING[reach], SPEEDS[reach]):
        poses = lookahead.run(start, state.block, targets)
        walk = np.linalg.norm(start - state.agent) / WALK
        cost = distance_to_goal(poses) - here + STEP_COST * (walk + np.arange(1, len(targets) + 1))
        length = int(cost.argmin()) + 1
        best.append((cost[length - 1] + rng.gumbel(0, 0.3 + patience), start, targets[:length]))
    for cost, start, targets in sorted(best, key=lambda push: push[0])[:60]:
        if cost >= 0 and not patience:
            break
        way = _way(state.agent, start, obstacle)
        if way is not None:
            return [*_walk(state.agent, way), *targets]
    return []


def _pushes(
    rng: np.random.Generator, block: np.ndarray, spacing: float, speeds: tuple[float, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield start points (2,) around the block, each with the targets (12, 2) of a push from it."""
    corners = outline(block)
    for first, second in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = (second - first) / np.linalg.norm(second - first)
        inward = np.array([-along[1], along[0]])
        side = np.linalg.norm(second - first)
        for place in np.arange(rng.uniform(3, 3 + spacing), side, spacing):
            start = first + along * place - inward * REACH
            if not np.all((start > 22) & (start < ARENA - 22)):
                continue
            for slope in (-0.5, 0.0, 0.5):
                direction = (inward + slope * along) / np.hypot(1, slope)
                for speed in speeds:
                    targets = start + direction * speed * np.arange(1, LONGEST + 1)[:, None]
                    yield start, np.clip(targets, 20, ARENA - 20)


def _way(here: np.ndarray, there: np.ndarray, obstacle: shapely.Polygon) -> list[np.ndarray] | None:
    """Return the waypoints of the shortest path around the obstacle to `there`.

    The result is None if there is no path.
    """
    corners = np.array(obstacle.buffer(3, join_style="mitre").exterior.coords[:-1])
    nodes = [here, there, *(corner for corner in corners if np.all((corner > 20) & (corner < ARENA - 20)))]
    shapely.prepare(obstacle)
    lengths, previous = {0: 0.0}, {}
    open_nodes = set(range(len(nodes)))
    while open_nodes & lengths.keys():
        node = min(open_nodes & lengths.keys(), key=lengths.__getitem__)
        if node == 1:
            break
        open_nodes.remove(node)
        for other in open_nodes:
            length = lengths[node] + float(np.linalg.norm(nodes[other] - nodes[node]))
            if length < lengths.get(other, np.inf):
                line = shapely.LineString([nodes[node], nodes[other]])
                # after a push, the pusher may still be within the margin of the obstacle
                if node == 0 and obstacle.contains(shapely.Point(here)):
                    line = line.difference(shapely.Point(here).buffer(8))
                if not obstacle.intersects(line):
                    lengths[other], previous[other] = length, node
    if 1 not in lengths:
        return None
    way, node = [], 1
    while node:
        way.append(nodes[node])
        node = previous[node]
    return way[::-1]


def _walk(here: np.ndarray, way: list[np.ndarray]) -> list[np.ndarray]:
    """Return targets along the path; the last one is repeated, so that the pusher comes to rest."""
    targets = []
    for waypoint in way:
        distance = float(np.linalg.norm(waypoint - here))
        steps = max(1, int(np.ceil(distance / WALK)))
        targets += [here + (waypoint - here) * step / steps for step in range(1, steps + 1)]
        here = waypoint
    return [*targets, here, here]


def _wander(rng: np.random.Generator, state: State) -> list[np.ndarray]:
    """Return targets that move the pusher away from the block."""
    away = state.agent - state.block_centre
    aim = state.block_centre + away / max(float(np.linalg.norm(away)), 1e-6) * 130
    return _walk(state.agent, [np.clip(aim + rng.normal(0, 20, 2), 20, ARENA - 20)])
