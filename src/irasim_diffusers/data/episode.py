"""The one form in which every data source gives its episodes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Episode:
    """One recorded episode of a robot.

    Row k of `actions` is the command given at frame k; it drives the step that ends in frame k + 1.
    """

    frames: np.ndarray  # (T, H, W, 3), uint8 RGB
    actions: np.ndarray  # (T, A), float32, units of the data set
    states: dict[str, np.ndarray] = field(default_factory=dict)  # key -> (T, S), float32
    task: str = ""

    def __len__(self) -> int:
        return len(self.frames)
