"""Estimate the poses of the Push-T pusher and block from frames.

Each pixel's color is unmixed into fractions of floor, goal, block and pusher. The pusher's position is the centroid of
its fraction map. The block's pose is a least-squares fit of a rendered block to the block's fraction map.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import label, uniform_filter
from scipy.optimize import least_squares
from simulator import PUSHER_RADIUS

# mean colors of floor, goal, block and pusher in a frame
COLOURS = np.array([[255, 255, 255], [144, 238, 144], [140, 160, 181], [74, 120, 246]]) / 255
UNMIX = np.linalg.inv(np.vstack([COLOURS.T, np.ones(4)]))  # maps (r, g, b, 1) to fractions of the colors
BLOCK, PUSHER = 2, 3
UNIT = 96 / 512  # pixels per arena unit
WALL = 2  # width of the walls at the border, in pixels
# in the block's frame, in pixels: (center, half extents) of bar and stem, and the center of mass
PARTS = [
    (np.array([0, 15]) * UNIT, np.array([60, 15]) * UNIT),
    (np.array([0, 75]) * UNIT, np.array([15, 45]) * UNIT),
]
CENTRE = np.array([0, 45]) * UNIT
BLOCK_AREA = 6300 * UNIT**2  # pixels


@dataclass(frozen=True)
class Poses:
    """Poses in N frames; NaN where a pose was not found."""

    pusher: np.ndarray  # (N, 2): x, y of the center, pixels
    block: np.ndarray  # (N, 3): x, y of the center of mass, pixels, and the angle, radians

    @property
    def found(self) -> np.ndarray:
        """Whether both poses were found (N,)."""
        return np.isfinite(self.pusher[:, 0]) & np.isfinite(self.block[:, 0])


def read_poses(frames: np.ndarray, pusher_radius: float = PUSHER_RADIUS) -> Poses:
    """Estimate the poses in each frame.

    The pusher is found if a window contains a blue area of 0.5 to 1.6 times the pusher's area, and the blue area
    elsewhere is at most half the pusher's area. The block is found if the gray area is at least half the block's area, and
    the intersection over union of the fitted block and the gray area exceeds 0.7.

    Args:
        frames: Frames (N, 96, 96, 3), uint8 or floats in [0, 1].
        pusher_radius: Radius of the pusher in arena units.
    """
    shares = _shares(frames)
    return Poses(
        np.stack([_find_pusher(share, pusher_radius * UNIT) for share in shares[..., PUSHER]]),
        np.stack([_find_block(share) for share in shares[..., BLOCK]]),
    )


def one_pusher(frames: np.ndarray, pusher_radius: float = PUSHER_RADIUS) -> np.ndarray:
    """Return whether exactly one pusher is visible (N,) in frames (N, 96, 96, 3).

    Frames are uint8, or floats in [0, 1]. A pusher is a connected region of at least 4 pixels, each of which is more than
    half blue. There must be exactly one such region, with less than 1.6 times the pusher's area. Apart from the 4 pixels, the
    area has no lower bound, because only a part of the pusher is visible at the edges of the arena.
    """
    area = np.pi * (pusher_radius * UNIT) ** 2
    found = []
    for share in _shares(frames)[..., PUSHER]:
        regions, number = label(share > 0.5)
        sizes = np.bincount(regions.ravel(), minlength=number + 1)[1:]
        sizes = sizes[sizes >= 4]
        found.append(len(sizes) == 1 and sizes[0] < 1.6 * area)
    return np.array(found)


def true_poses(agent: np.ndarray, block: np.ndarray) -> Poses:
    """Convert states, agent (N, 2) and block (N, 3) in arena units and radians, to poses in pixels."""
    cos, sin = np.cos(block[:, 2]), np.sin(block[:, 2])
    center = block[:, :2] * UNIT + np.stack([-sin, cos], axis=1) * CENTRE[1]
    return Poses(agent * UNIT - 0.5, np.concatenate([center - 0.5, block[:, 2:]], axis=1))


def pose_errors(read: Poses, true: Poses) -> dict[str, np.ndarray]:
    """Return errors (N,) of `pusher`, `block_centre` (pixels), `block_angle` (degrees); NaN if not found."""
    turn = (read.block[:, 2] - true.block[:, 2] + np.pi) % (2 * np.pi) - np.pi
    return {
        "pusher": np.linalg.norm(read.pusher - true.pusher, axis=1),
        "block_centre": np.linalg.norm(read.block[:, :2] - true.block[:, :2], axis=1),
        "block_angle": np.degrees(np.abs(turn)),
    }


def _shares(frames: np.ndarray) -> np.ndarray:
    """Return the fractions (N, 96, 96, 4) of the four colors in each pixel; zero at the walls."""
    pixels = frames / 255 if frames.dtype == np.uint8 else frames
    shares = np.clip(np.concatenate([pixels, np.ones_like(pixels[..., :1])], axis=-1) @ UNMIX.T, 0, 1)
    shares[:, :WALL] = shares[:, -WALL:] = shares[:, :, :WALL] = shares[:, :, -WALL:] = 0
    return shares


def _find_pusher(share: np.ndarray, radius: float) -> np.ndarray:
    """Find the center (2,) of a pusher of `radius` pixels in its fraction map (96, 96); NaN if not found."""
    weights = np.where(share > 0.3, share, 0)
    reach = int(np.ceil(radius))
    row, column = np.unravel_index(uniform_filter(weights, 2 * reach + 1, mode="constant").argmax(), weights.shape)
    window = tuple(slice(max(0, middle - reach - 2), middle + reach + 3) for middle in (row, column))
    area = weights[window].sum()
    elsewhere = weights.sum() - area
    whole = np.pi * radius**2
    if not 0.5 * whole < area < 1.6 * whole or elsewhere > 0.5 * whole:
        return np.full(2, np.nan)
    grid = np.stack(np.meshgrid(np.arange(96), np.arange(96)), axis=-1)[window]
    return np.tensordot(weights[window], grid, 2) / area


def _find_block(share: np.ndarray) -> np.ndarray:
    """Fit the pose (3,) of the block to its fraction map (96, 96); NaN if it is not found."""
    weights = np.where(share > 0.3, share, 0)
    if weights.sum() < 0.5 * BLOCK_AREA:
        return np.full(3, np.nan)
    rows, columns = np.nonzero(weights)
    window = (slice(max(0, rows.min() - 4), rows.max() + 5), slice(max(0, columns.min() - 4), columns.max() + 5))
    grid = np.stack(np.meshgrid(np.arange(96), np.arange(96)), axis=-1)[window]
    seen = share[window]
    middle = np.tensordot(weights[window], grid, 2) / weights.sum()

    def difference(pose: np.ndarray) -> np.ndarray:
        return (draw_block(pose, grid) - seen).ravel()

    # the centroid of the area is 4.3 arena units closer to the bar than the center of mass
    starts = [
        np.array([*(middle + 4.3 * UNIT * np.array([-np.sin(angle), np.cos(angle)])), angle])
        for angle in np.arange(0, 2 * np.pi, np.pi / 12)
    ]
    start = min(starts, key=lambda pose: np.square(difference(pose)).sum())
    pose = least_squares(difference, start, x_scale=[1.0, 1.0, 0.1], diff_step=1e-3, max_nfev=30).x
    drawn = draw_block(pose, grid)
    overlap = np.minimum(drawn, seen).sum() / np.maximum(drawn, seen).sum()
    return pose if overlap > 0.7 else np.full(3, np.nan)


def draw_block(pose: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the fraction of each pixel of `grid` (..., 2) that a block at `pose` (3,) covers."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    local = (grid - pose[:2]) @ np.array([[cos, -sin], [sin, cos]]) + CENTRE
    outside = [np.max(np.abs(local - center) - extent, axis=-1) for center, extent in PARTS]
    return np.clip(0.5 - np.minimum(*outside), 0, 1)  # signed distance, in pixels
