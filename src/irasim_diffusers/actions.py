"""Raw actions: checks, the hold action, and conversion between absolute states and actions."""

import warnings
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation


def prepare_actions(actions: Any, action_dim: int) -> torch.Tensor:
    """Check raw actions and convert them to a batch.

    Args:
        actions: Actions (n, A) or (B, n, A): arrays, tensors or nested lists, in the units of the dataset.
        action_dim: Number of components A of the model's action space.

    Returns:
        Actions (B, n, A), float32.

    Raises:
        ValueError: If actions are empty, ragged, not numbers or not finite, or do not have the shape (n, A) or (B, n, A).
    """
    wanted = f"`actions` must be (n, {action_dim}) or (batch, n, {action_dim})"
    try:
        if isinstance(actions, list | tuple) and actions and all(torch.is_tensor(action) for action in actions):
            actions = torch.stack(tuple(actions))
        if not torch.is_tensor(actions):
            array = np.asarray(actions)
            is_text = array.dtype.kind == "O" and any(isinstance(value, str | bytes) for value in array.ravel())
            if is_text or array.dtype.kind not in "biufO":  # numpy would convert text, and drop imaginary parts
                raise TypeError(f"got values of type {array.dtype}")
            with np.errstate(over="ignore"):  # values outside the range of float32 become inf and raise an error below
                actions = torch.from_numpy(array.astype(np.float32))
        if actions.is_complex():
            raise TypeError(f"got values of type {actions.dtype}")
        actions = actions.to(torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{wanted}, all numbers and all sequences of equal length: {str(error).rstrip('.')}."
        ) from error
    if actions.ndim not in (2, 3) or 0 in actions.shape[:-1] or actions.shape[-1] != action_dim:
        remedy = (
            "there is nothing to predict"
            if 0 in (actions.shape[:-1] or actions.shape)
            else f"pass one row of {action_dim} components for each frame to predict"
        )
        raise ValueError(f"{wanted}, got {tuple(actions.shape)}: {remedy}.")
    if not torch.isfinite(actions).all():
        place = tuple(torch.nonzero(~torch.isfinite(actions))[0].tolist())
        raise ValueError(
            f"`actions` must be finite, got {actions[place].item()} at index {place}: check the recording or policy "
            "that they come from."
        )
    return actions if actions.ndim == 3 else actions.unsqueeze(0)


def hold_action(last_action: torch.Tensor, action_space: str, derivation: str = "recorded") -> torch.Tensor:
    """Return the action for no motion after `last_action`.

    Args:
        last_action: Actions (..., A), raw units.
        action_space: `"relative"` or `"absolute"`.
        derivation: One of `DERIVATIONS`.

    Returns:
        Actions (..., A): the last action if the space or the derivation is `"absolute"`, and zero otherwise. For motions of
        poses (`MOTION_COMPONENTS`): no translation, the identity rotation, and the other components (such as a gripper opening)
        of the last action.
    """
    hold = last_action.clone()
    if action_space != "absolute" and derivation != "absolute":
        moving = MOTION_COMPONENTS.get(derivation, hold.shape[-1])
        hold[..., :moving] = 0
        if derivation == "relative_6d":
            hold[..., [3, 7]] = 1
    return hold


DERIVATIONS = ("recorded", "relative_euler", "relative_6d", "relative_planar", "absolute")
"""Origins of actions: recorded, or computed from the states of successive frames; see `derive_actions`."""
MOTION_COMPONENTS = {"relative_euler": 6, "relative_6d": 9}
"""Number of leading components that are the motion of a pose; the other components of an action follow."""


def derive_actions(states: np.ndarray, derivation: str) -> np.ndarray:
    """Compute actions from the states of successive frames.

    - `"relative_euler"`: states are (x, y, z, roll, pitch, yaw, rest...) in meters and radians, with extrinsic xyz Euler angles.
      Actions are motions in the frame of the previous pose (paper, appendix 9): R[k-1]^T (p[k] - p[k-1]), the Euler angles of
      R[k-1]^T R[k], and the rest (such as the gripper opening) of the next frame.
    - `"relative_6d"`: as `"relative_euler"`, with the first two columns of the relative rotation matrix instead of Euler
      angles. This representation has no singularities (https://arxiv.org/abs/1812.07035).
    - `"relative_planar"`: the differences between successive states.
    - `"absolute"`: the next states.

    Args:
        states: States (T, S).
        derivation: One of `DERIVATIONS` except `"recorded"`.

    Returns:
        Actions (T - 1, A), float64. Row k leads from frame k to frame k + 1.

    Raises:
        ValueError: If the derivation is `"recorded"` or unknown, or the states are not a finite matrix with enough components.
    """
    states = np.asarray(states, dtype=np.float64)
    _check_derivation(derivation, states)
    previous, following = states[:-1], states[1:]
    if derivation == "absolute":
        return following
    if derivation == "relative_planar":
        return following - previous
    start, end = _rotations(previous), _rotations(following)
    translation = start.inv().apply(following[:, :3] - previous[:, :3])
    turn = start.inv() * end
    return np.concatenate([translation, _turn_to_action(turn, derivation), following[:, 6:]], axis=1)


def integrate_actions(state: np.ndarray, actions: np.ndarray, derivation: str) -> np.ndarray:
    """Compute the states that actions lead to, the inverse of `derive_actions`.

    Args:
        state: First state (S,).
        actions: Actions (n, A).
        derivation: See `derive_actions`.

    Returns:
        States (n + 1, S), float64, including the first one.

    Raises:
        ValueError: If the derivation is `"recorded"` or unknown, or the state is not a finite vector with enough components.
    """
    state, actions = np.asarray(state, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    _check_derivation(derivation, state[None], "state")
    if derivation == "absolute":
        return np.concatenate([state[None], actions])
    if derivation == "relative_planar":
        return np.concatenate([state[None], state + np.cumsum(actions, axis=0)])
    states, pose = [state], _rotations(state)
    size = 9 if derivation == "relative_6d" else 6
    for action in actions:
        position = states[-1][:3] + pose.apply(action[:3])
        pose = pose * _action_to_turn(action[3:size], derivation)
        states.append(np.concatenate([position, _euler_angles(pose), action[size:]]))
    return np.stack(states)


def _check_derivation(derivation: str, states: np.ndarray, name: str = "states") -> None:
    if derivation not in DERIVATIONS[1:]:
        raise ValueError(f"`derivation` must be one of {DERIVATIONS[1:]}, got {derivation!r}.")
    least = 6 if derivation in ("relative_euler", "relative_6d") else 1
    if states.ndim != 2 or states.shape[1] < least:
        wanted, found = (
            (f"({least} or more,)", states.shape[1:]) if name == "state" else (f"(T, {least} or more)", states.shape)
        )
        raise ValueError(f"`{name}` must be {wanted} for {derivation!r}, got {found}.")
    if not np.isfinite(states).all():
        frame = int(np.nonzero(~np.isfinite(states).all(axis=1))[0][0])
        raise ValueError(f"`{name}` must be finite, got {states[frame].tolist()} at frame {frame}.")


def _rotations(states: np.ndarray) -> Rotation:
    return Rotation.from_euler("xyz", states[..., 3:6])


def _euler_angles(rotation: Rotation) -> np.ndarray:
    with warnings.catch_warnings():  # at a pitch of 90 degrees, roll and yaw are not unique
        warnings.simplefilter("ignore", UserWarning)
        return rotation.as_euler("xyz")


def _turn_to_action(turn: Rotation, derivation: str) -> np.ndarray:
    if derivation == "relative_euler":
        return _euler_angles(turn)
    return turn.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6)


def _action_to_turn(action: np.ndarray, derivation: str) -> Rotation:
    if derivation == "relative_euler":
        return Rotation.from_euler("xyz", action)
    first, second = action[:3], action[3:]
    first = first / np.linalg.norm(first)
    second = second - first.dot(second) * first
    second = second / np.linalg.norm(second)
    return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=1))
