"""Predictions longer than a model's window, and the protocol of everything that predicts."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class WorldModel(Protocol):
    """Whatever predicts the futures of action sequences: a pipeline, a distilled student, a simulator."""

    def predict(self, frames: Any, actions: Any, **kwargs: Any) -> torch.Tensor:
        """Predict the frames that the actions lead to.

        Args:
            frames: The history of one clip, or a batch of histories; see `IRASimPipeline.__call__`.
            actions: Actions (n, A), or (K, n, A), in raw units.
            kwargs: What the model at hand takes beyond that.

        Returns:
            Frames (K, n, 3, H, W) in [0, 1], or latents (K, C, n, h, w) if asked for.
        """
        ...


def chain_windows(
    predict_window: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    history: torch.Tensor,
    actions: torch.Tensor,
    sample_frames: int,
    num_history_frames: int,
) -> torch.Tensor:
    """Predict any number of frames window by window (paper, section 4.1).

    The first window starts from the history given; each following one from the last `num_history_frames` frames so far.

    Args:
        predict_window: Takes a history (B, C, h, H, W) and actions (B, m, A), returns the future (B, C, m, H, W), or none of
            its frames to end there.
        history: First history (B, C, h, H, W).
        actions: All actions (B, n, A).
        sample_frames: Frames of a window, history and predicted.
        num_history_frames: History frames of every window after the first.

    Returns:
        The future (B, C, n, H, W).
    """
    futures = []
    while actions.shape[1]:
        length = sample_frames - history.shape[2]
        future = predict_window(history, actions[:, :length])
        futures.append(future)
        if not future.shape[2]:
            break
        history = torch.cat([history, future], dim=2)[:, :, -num_history_frames:]
        actions = actions[:, length:]
    return torch.cat(futures, dim=2)


def count_windows(num_actions: int, history: int, sample_frames: int, num_history_frames: int) -> int:
    """Windows that `chain_windows` runs for `num_actions` actions."""
    later = max(0, num_actions - (sample_frames - history))
    return 1 + -(-later // (sample_frames - min(num_history_frames, sample_frames - 1)))
