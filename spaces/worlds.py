"""Models of the Space, each with its example clip and its computing thread."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from irasim_diffusers.commands import read_actions
from irasim_diffusers.data import read_video
from irasim_diffusers.devices import default_device, fast_dtype

Result = TypeVar("Result")
EMBEDDED = "push-t"
NUM_STARTS = 5
NUM_DEMO = 40
TURNS_BETWEEN_TRIMS = 20


@dataclass(frozen=True)
class Start:
    """A start image with its history."""

    name: str
    frames: np.ndarray  # (h, H, W, 3), uint8: the model's history; the last frame is the start image
    action: np.ndarray | None  # (A,): the action that led to it (or else the next one), raw units; None if unknown
    demo: np.ndarray | None  # (m, A): the recorded actions after it; None if unknown


@dataclass
class World:
    """A model, its example clip, and the thread in which it computes.

    Predictions run one at a time, because a pipeline's scheduler has state, and in one thread, because torch keeps memory and
    worker threads for each computing thread. Except with ZeroGPU, driving requests interrupt a long prediction: waiting requests
    are served before each of its network evaluations.
    """

    name: str
    pipeline: IRASimPipeline
    clip: np.ndarray | None = None  # (T, H, W, 3), uint8: the example clip, if the checkpoint has one
    clip_actions: np.ndarray | None = None  # (n, A): row k leads to frame `clip_history` + k of the clip
    clip_history: int = 1
    starts: dict[str, Start] = field(default_factory=dict)
    _turns: int = 0
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _requests: deque[tuple[Future, Callable[[], Any]]] = field(default_factory=deque)  # waiting requests of `run`
    _interruptible: bool = False  # whether the thread runs work of `run_long`; only the thread itself changes it

    def __post_init__(self) -> None:
        if not ZERO_GPU:  # with ZeroGPU, another process computes, which cannot serve requests of this process
            self.pipeline.transformer.register_forward_pre_hook(lambda *_: self._serve_waiting())

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call `work(*arguments)` in the model's thread for a driving visitor, in order of arrival."""
        future: Future = Future()
        self._requests.append((future, partial(_context().run, work, *arguments)))
        self._thread.submit(self._serve_next)
        return await asyncio.wrap_future(future)

    async def run_long(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call `work(*arguments)` in the model's thread.

        Requests of `run` are served between the network evaluations of `work`, or with ZeroGPU after `work`.
        """
        long_work = partial(self._run_interruptibly, partial(_context().run, work, *arguments))
        return await asyncio.get_running_loop().run_in_executor(self._thread, long_work)

    def _run_interruptibly(self, work: Callable[[], Result]) -> Result:
        self._interruptible = True
        try:
            return work()
        finally:
            self._interruptible = False
            self._trim_memory()

    def _serve_waiting(self) -> None:
        """Serve the requests that wait now, but no later ones, so that the long prediction advances, too."""
        if not self._interruptible:
            return
        self._interruptible = False
        try:
            for _ in range(len(self._requests)):
                self._serve_next()
        finally:
            self._interruptible = True

    def _serve_next(self) -> None:
        """Serve the oldest request, if a long prediction has not served it already."""
        if not self._requests:
            return
        future, work = self._requests.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # raised in the caller, as an executor does
            future.set_exception(error)
        self._trim_memory()

    def _trim_memory(self) -> None:
        self._turns += 1
        if self._turns % TURNS_BETWEEN_TRIMS == 0 and sys.platform == "linux":
            # return freed heap pages to the OS: fragmentation grows by megabytes per request
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


class Worlds(dict[str, World]):
    """Models by name.

    Args:
        models: Pipeline folders or Hub ids; `"push-t"` is the embedded model.
        dtype: None for the fastest dtype of the device.
        device: None for CUDA if available, else the CPU.

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
        """Return the model with this name.

        Raises:
            ValueError: If it does not exist or could not be loaded.
        """
        if not isinstance(name, str) or name not in self:
            reason = f": {self.failures[name]}" if isinstance(name, str) and name in self.failures else ""
            raise ValueError(
                f"`model` must be one of {', '.join(self) or '(none could be loaded)'}, got {name!r}{reason}."
            )
        return self[name]


def _context() -> Any:
    return copy_context()  # ZeroGPU reads the visitor from the context


def load_world(name: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> World:
    """Load a model with its example clip.

    Raises:
        OSError: If the model does not exist or cannot be downloaded.
        ValueError: If its files are invalid.
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
    clip, actions = read_video(video), None if table is None else read_actions(table)
    history = len(clip) - len(actions) if actions is not None else 1
    return World(name, pipeline, clip, actions, history, _starts(pipeline, clip, actions))


def _example_file(model: str, name: str) -> Path | None:
    """Return a file of the checkpoint folder, or None if it does not exist."""
    if os.path.isdir(model):
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:
        return None


def _starts(pipeline: IRASimPipeline, clip: np.ndarray, actions: np.ndarray | None) -> dict[str, Start]:
    """Select evenly spaced start images of the clip."""
    length = pipeline.transformer.config.num_history_frames
    starts = {}
    for end in np.linspace(length, len(clip), NUM_STARTS).round().astype(int):
        name, action, demo = f"frame {end - 1}", None, None
        if actions is not None:
            row = end - (len(clip) - len(actions))  # index of the next action
            action, demo = actions[max(row - 1, 0)], actions[row : row + NUM_DEMO]
        starts[name] = Start(name, clip[end - length : end], action, demo)
    return starts
