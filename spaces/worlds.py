"""The models that the Space serves: each loaded once, with its example clip, and driven by one visitor at a time."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from zero_gpu import ZERO_GPU, LentPipeline

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.commands.files import read_actions, read_frames
from irasim_diffusers.devices import default_device, fast_dtype

Result = TypeVar("Result")
EMBEDDED = "push-t"
NUM_STARTS = 5
NUM_DEMO = 40
TURNS_BETWEEN_TRIMS = 20


@dataclass(frozen=True)
class Start:
    """A picture to start from."""

    name: str
    frames: np.ndarray  # (h, H, W, 3), uint8: as many as the model takes as history, the start being the last
    action: np.ndarray | None  # (A,): the action that led to it, in raw units; None where nothing is known
    demo: np.ndarray | None  # (m, A): the actions recorded after it


@dataclass
class World:
    """A model and what belongs to it.

    One prediction runs at a time, for a pipeline's scheduler keeps state, and in one thread, for torch keeps memory and helpers for
    each thread that computes.
    """

    name: str
    pipeline: IRASimPipeline
    clip: np.ndarray | None = None  # (T, H, W, 3), uint8: the example clip, where the checkpoint has one
    clip_actions: np.ndarray | None = None  # (n, A): row k leads to frame `clip_history` + k of it
    clip_history: int = 1
    starts: dict[str, Start] = field(default_factory=dict)
    _turns: int = 0
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """`work(*arguments)` in the model's thread, when it is this caller's turn: who asked first comes first."""
        in_context = partial(copy_context().run, work, *arguments)  # which tells ZeroGPU who asks
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._take_turn, in_context)

    def _take_turn(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        finally:
            self._turns += 1
            if self._turns % TURNS_BETWEEN_TRIMS == 0 and sys.platform == "linux":
                # small frames that are kept lie between large tensors that are not: megabytes a turn, unless given back
                getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


class Worlds(dict[str, World]):
    """Models by name.

    Args:
        models: Pipeline folders or Hub ids; `"push-t"` is the model that ships in the package.
        dtype: None for the fastest on the device.
        device: None for CUDA where there is one.

    Attributes:
        failures: Models that could not be loaded, with the reason; the page shows them.
    """

    def __init__(
        self, models: list[str], dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        self.failures: dict[str, str] = {}
        for name in models:
            try:
                self[name] = load_world(name, dtype, device)
            except (OSError, ValueError) as error:
                self.failures[name] = " ".join(str(error).split())

    def named(self, name: object) -> World:
        """The model of that name.

        Raises:
            ValueError: If there is none.
        """
        if not isinstance(name, str) or name not in self:
            reason = f": {self.failures[name]}" if isinstance(name, str) and name in self.failures else ""
            raise ValueError(
                f"`model` must be one of {', '.join(self) or '(none could be loaded)'}, got {name!r}{reason}."
            )
        return self[name]


def load_world(name: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> World:
    """Load a model with its example clip.

    Raises:
        OSError: If there is no such model.
        ValueError: If it does not fit.
    """
    folder = str(embedded_checkpoint()) if name == EMBEDDED else name
    device = device or ("cuda" if ZERO_GPU else default_device())
    dtype = dtype or (torch.bfloat16 if ZERO_GPU else fast_dtype(device))
    pipeline: Any = IRASimPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    if ZERO_GPU:
        pipeline = LentPipeline(name, pipeline)
    video, table = _example_file(folder, "example.mp4"), _example_file(folder, "example_actions.csv")
    if video is None:
        return World(name, pipeline)
    clip, actions = read_frames(video), None if table is None else read_actions(table)
    history = len(clip) - len(actions) if actions is not None else 1
    return World(name, pipeline, clip, actions, history, _starts(pipeline, clip, actions))


def _example_file(model: str, name: str) -> Path | None:
    """A file that lies beside the checkpoint, if it has it."""
    if os.path.isdir(model):
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:
        return None


def _starts(pipeline: IRASimPipeline, clip: np.ndarray, actions: np.ndarray | None) -> dict[str, Start]:
    """Pictures spread over the clip."""
    length = pipeline.transformer.config.num_history_frames
    starts = {}
    for end in np.linspace(length, len(clip), NUM_STARTS).round().astype(int):
        name, action, demo = f"frame {end - 1}", None, None
        if actions is not None:
            row = end - (len(clip) - len(actions))  # of the action that follows
            action, demo = actions[max(row - 1, 0)], actions[row : row + NUM_DEMO]
        starts[name] = Start(name, clip[end - length : end], action, demo)
    return starts
