"""Keys that steer a robot, named like a browser's KeyboardEvent.key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..action_space import ActionSpace

IMAGE_KEYS = (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))
"""(negative, positive) key pair of each component, in image axes: x right, y down."""

TABLE_KEYS = IMAGE_KEYS[::-1]
"""For planar motions with the camera facing the robot, as in Language-Table: x points away from the base, y to the left."""

ARM_KEYS = (
    ("ArrowDown", "ArrowUp"),
    ("ArrowRight", "ArrowLeft"),
    ("f", "r"),
    ("j", "l"),
    ("k", "i"),
    ("o", "u"),
    ("h", "g"),
)
"""For an arm seen from behind its base: x forward, y to the left, z up; then roll, pitch, yaw and gripper."""

SAME_KEYS = {"w": "ArrowUp", "a": "ArrowLeft", "s": "ArrowDown", "d": "ArrowRight"}
"""Alternative keys for the arrow keys."""


@dataclass(frozen=True)
class Control:
    """Key for one direction of one component of the action space."""

    key: str
    component: int
    sign: int  # -1 or 1
    label: str  # such as "target_x +"


def key_controls(space: ActionSpace) -> list[Control]:
    """Return the controls of an action space, two per component.

    Components without keys are not steered, for example the rotation of `relative_6d`, which consists of matrix columns.
    """
    if len(space) == 2:
        keys = dict(enumerate(IMAGE_KEYS if space.kind == "absolute" else TABLE_KEYS))
    elif space.derivation == "relative_6d":
        keys = dict(enumerate(ARM_KEYS[:3])) | {9: ARM_KEYS[-1]}
    else:
        keys = dict(enumerate(ARM_KEYS))
    return [
        Control(key, component, sign, f"{space.names[component]} {'+' if sign > 0 else '-'}")
        for component, pair in keys.items()
        if component < len(space)
        for key, sign in zip(pair, (-1, 1), strict=True)
    ]


def key_command(space: ActionSpace, pressed: Iterable[str]) -> np.ndarray:
    """Return the command (A,) of the pressed keys for `Steering.action`; unknown keys are ignored."""
    keys = {key if len(key) > 1 else key.lower() for key in pressed}
    keys = {SAME_KEYS.get(key, key) for key in keys}
    command = np.zeros(len(space))
    for control in key_controls(space):
        command[control.component] += control.sign * (control.key in keys)
    return command
