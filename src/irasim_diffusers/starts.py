"""Initial frames of environment episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image


@dataclass(frozen=True)
class Start:
    """Initial frames of one episode.

    Args:
        frames: History in time order: one frame (H, W, 3) or h frames (h, H, W, 3), uint8, or PIL images.
        state: Robot state (S,) at the last frame, if known.

    Raises:
        ValueError: If the frames are empty, not uint8 RGB images or of different sizes, or the state is not a finite vector.
    """

    frames: Any  # (h, H, W, 3), uint8, after construction
    state: Any = None  # (S,), float64

    def __post_init__(self) -> None:
        frames = self.frames
        if isinstance(frames, PIL.Image.Image):
            frames = frames.convert("RGB")
        elif isinstance(frames, list | tuple):
            frames = [frame.convert("RGB") if isinstance(frame, PIL.Image.Image) else frame for frame in frames]
        try:
            pixels = np.asarray(frames)
        except ValueError as error:
            raise ValueError(f"`frames` must all have the same size: {str(error).rstrip('.')}.") from error
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(
                f"`frames` must be non-empty uint8 RGB images (H, W, 3) or (h, H, W, 3), got {pixels.dtype} {pixels.shape}: "
                "convert floats in [0, 1] by `(255 * frames).round().astype('uint8')`, and other images with "
                "`image.convert('RGB')`."
            )
        object.__setattr__(self, "frames", pixels)
        if self.state is not None:
            state = np.asarray(self.state, dtype=np.float64)
            if state.ndim != 1 or not len(state) or not np.isfinite(state).all():
                raise ValueError(
                    f"`state` must be a finite vector (S,) with S at least 1, got {state.tolist()!r:.80}."
                )
            object.__setattr__(self, "state", state)


@dataclass(frozen=True)
class EpisodeStarts(Sequence[Start]):
    """Starts of the episodes of a dataset, decoded on access.

    Args:
        episodes: A data source of `irasim_diffusers.data`, such as `open_dataset(path)`.
        num_frames: Number of history frames of a start.
        first_frame: Index of the first history frame in its episode.
        state_key: Key of the robot state, such as `observation.state`. None for starts without states.
    """

    episodes: Any
    num_frames: int = 1
    first_frame: int = 0
    state_key: str | None = None

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: Any) -> Start:  # type: ignore[override]
        """Decode the start of one episode.

        Raises:
            ValueError: If the episode cannot be read or is too short, or has no state `state_key`.
        """
        window = self.episodes.window(int(index), self.first_frame, self.num_frames)
        if self.state_key is None:
            return Start(window.frames)
        if self.state_key not in window.states:
            raise ValueError(f"`state_key` must be None or one of {sorted(window.states)}, got {self.state_key!r}.")
        return Start(window.frames, window.states[self.state_key][-1])
