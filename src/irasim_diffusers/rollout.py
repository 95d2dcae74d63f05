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
    chunk_length: int,
    num_history_frames: int,
) -> torch.Tensor:
    """Predict any number of frames chunk by chunk (paper, section 4.1).

    The first chunk starts from the given history, each later one from the last `num_history_frames` frames so far.

    Args:
        predict_window: Takes a history (B, C, h, H, W) and actions (B, m, A) and returns the future (B, C, m, H, W). An
            empty future stops the rollout.
        history: First history (B, C, h, H, W).
        actions: All actions (B, n, A).
        chunk_length: Actions of a chunk; the last chunk may be shorter.
        num_history_frames: Maximum number of history frames.

    Returns:
        The future (B, C, n, H, W).
    """
    futures = []
    for chunk in actions.split(chunk_length, dim=1):
        future = predict_window(history, chunk)
        futures.append(future)
        if not future.shape[2]:
            break
        history = torch.cat([history, future], dim=2)[:, :, -num_history_frames:]
    return torch.cat(futures, dim=2)
