"""Action spaces: checking raw actions, and the action that asks for no motion."""

from typing import Any

import numpy as np
import torch


def prepare_actions(actions: Any, action_dim: int) -> torch.Tensor:
    """Check raw actions and bring them into one form.

    Args:
        actions: Actions (n, A) or (B, n, A): numpy, torch or nested lists, in the units of the data set.
        action_dim: Components A of the model's action space.

    Returns:
        Actions (B, n, A), float32.

    Raises:
        ValueError: If they are empty, ragged, of another dimension, or not finite.
    """
    wanted = f"`actions` must be (n, {action_dim}) or (batch, n, {action_dim})"
    try:
        if not torch.is_tensor(actions):
            actions = torch.from_numpy(np.asarray(actions, dtype=np.float32))
        actions = actions.to(torch.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{wanted}, all numbers and all sequences of one length; {error}.") from error
    if actions.ndim not in (2, 3) or 0 in actions.shape[:-1] or actions.shape[-1] != action_dim:
        remedy = "there is nothing to predict" if 0 in actions.shape else "one row for each frame to predict"
        raise ValueError(f"{wanted}, got {tuple(actions.shape)}: {remedy}.")
    if not torch.isfinite(actions).all():
        place = tuple(torch.nonzero(~torch.isfinite(actions))[0].tolist())
        raise ValueError(
            f"`actions` must be finite, got {actions[place].item()} at index {place}: repair or cut the recording."
        )
    return actions if actions.ndim == 3 else actions.unsqueeze(0)


def hold_action(last_action: torch.Tensor, action_space: str) -> torch.Tensor:
    """The action (B, 1, A) that asks for no motion after `last_action` (B, 1, A).

    In an absolute space that is the target already being followed; in a relative one, zero.
    """
    return last_action if action_space == "absolute" else torch.zeros_like(last_action)
