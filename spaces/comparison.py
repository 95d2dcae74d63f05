"""Predictions by different models, samplers or seeds for the same actions, and their errors."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from visitor_files import resize
from worlds import World
from zero_gpu import ZERO_GPU, LentPipeline

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.metrics import frame_psnr

MAX_STEPS = 100


@dataclass(frozen=True)
class Setting:
    """Model, sampler, number of steps and seed of a prediction."""

    world: World
    scheduler: str  # name of a diffusers class
    steps: int
    seed: int


@lru_cache
def scheduler_names(pipeline: IRASimPipeline) -> tuple[str, ...]:
    """List the schedulers that a checkpoint accepts, its own first."""
    own = type(pipeline.scheduler).__name__
    fitting = []
    for kind in pipeline.scheduler.compatibles:
        try:
            pipeline.with_scheduler(kind)
        except (ValueError, ImportError):  # does not fit the model, or requires a package that is not installed
            continue
        fitting.append(kind.__name__)
    return own, *sorted(set(fitting) - {own})


def pipeline_of(setting: Setting) -> IRASimPipeline:
    """Create a pipeline with the setting's scheduler that shares only the weights.

    Other predictions can therefore run between its network evaluations.

    Raises:
        ValueError: If the checkpoint does not accept the scheduler, or the number of steps is out of range.
    """
    pipeline = setting.world.pipeline
    if setting.scheduler not in scheduler_names(pipeline):
        raise ValueError(f"{setting.world.name} does not accept the scheduler {setting.scheduler!r}.")
    if not 1 <= setting.steps <= MAX_STEPS:
        raise ValueError(f"Steps must be 1 to {MAX_STEPS}, got {setting.steps}.")
    kinds = {kind.__name__: kind for kind in (type(pipeline.scheduler), *pipeline.scheduler.compatibles)}
    other = pipeline.with_scheduler(kinds[setting.scheduler])
    other.set_progress_bar_config(disable=True)
    return other


def name_settings(first: Setting, second: Setting | None) -> dict[str, Setting]:
    """Name the settings by their differences.

    Raises:
        ValueError: If the settings are equal, or the actions of the models have different numbers of components.
    """
    if second is None:
        return {"Prediction": first}
    if first == second:
        raise ValueError("Both settings are the same: change the model, the sampler, the steps or the seed of one.")
    dims = {one.world.pipeline.transformer.config.action_dim for one in (first, second)}
    if len(dims) > 1:
        raise ValueError(
            f"{first.world.name} and {second.world.name} cannot be compared: their actions have {sorted(dims)} components."
        )
    descriptions = {
        "world": lambda one: one.world.name,
        "scheduler": lambda one: one.scheduler.removesuffix("Scheduler"),
        "steps": lambda one: f"{one.steps} step{'s' * (one.steps > 1)}",
        "seed": lambda one: f"seed {one.seed}",
    }
    differing = [describe for name, describe in descriptions.items() if getattr(first, name) != getattr(second, name)]
    lettered = (("A", first), ("B", second))
    return {f"{letter}: {', '.join(describe(one) for describe in differing)}": one for letter, one in lettered}


async def predict(
    pipeline: IRASimPipeline, setting: Setting, history: np.ndarray, actions: np.ndarray
) -> AsyncIterator[np.ndarray]:
    """Predict chunk by chunk. Except with ZeroGPU, driving requests are served in between.

    Args:
        pipeline: Pipeline of the setting; another thread may set its `_interrupt`.
        setting: The setting.
        history: Frames (h, H, W, 3), uint8.
        actions: Actions (n, A).

    Yields:
        The predicted frames of a chunk (m, H, W, 3), uint8; with ZeroGPU, those of the whole video.
    """
    chunk_length = pipeline.chunk_length
    generator = torch.Generator().manual_seed(setting.seed)
    if ZERO_GPU:  # another process has the GPU, and a generator cannot be sent to it
        yield (await setting.world.run_long(predict_whole, pipeline, setting, history, actions, generator))[0]
        return
    frames: Any = pipeline.stream(
        history,
        actions,
        chunk_length=chunk_length,
        num_inference_steps=setting.steps,
        generator=generator,
        output_type="np",
        resize=True,
    )

    def next_chunk() -> list[np.ndarray]:
        return [(frame * 255).round().astype(np.uint8) for frame in islice(frames, chunk_length)]

    while predicted := await setting.world.run_long(next_chunk):
        yield np.stack(predicted)


def predict_whole(
    pipeline: IRASimPipeline, setting: Setting, histories: np.ndarray, actions: np.ndarray, generator: Any
) -> np.ndarray:
    """Predict whole videos in one call, for which ZeroGPU provides a GPU.

    Args:
        pipeline: Pipeline of the setting.
        setting: The setting.
        histories: Frames (h, H, W, 3) or (B, h, H, W, 3), uint8.
        actions: Actions (n, A) or (B, n, A).
        generator: Seeded generator, or one for each video.

    Returns:
        Predicted frames (B, n, H, W, 3), uint8.
    """
    lent: Any = LentPipeline(f"{setting.world.name} {setting.scheduler}", pipeline)
    options = {"num_inference_steps": setting.steps, "generator": generator, "output_type": "np", "resize": True}
    return (lent(histories, actions, **options).frames * 255).round().astype(np.uint8)


def align(panels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Extend videos (T, H, W, 3) to equal length with their last frames, and resize them to equal size."""
    length = max(map(len, panels.values()))
    size = next(iter(panels.values())).shape[1:3]
    return {
        name: resize(np.concatenate([frames, np.repeat(frames[-1:], length - len(frames), axis=0)]), size)
        for name, frames in panels.items()
    }


def side_by_side(panels: dict[str, np.ndarray]) -> np.ndarray:
    """Join videos of equal shape (T, H, W, 3) side by side; enlarge small videos."""
    whole = np.concatenate(list(panels.values()), axis=2)
    factor = max(1, 288 // whole.shape[1])
    return whole.repeat(factor, axis=1).repeat(factor, axis=2)


def errors(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Compute the PSNR in dB of predicted frames (n, H, W, 3) against the ground truth (m, H, W, 3).

    The result has one value for each of the first min(n, m) frames. The PSNR of equal frames is NaN.
    """
    count = min(len(prediction), len(truth))
    true = resize(truth[:count], prediction.shape[1:3])
    values = frame_psnr(prediction[:count] / 255, true / 255)
    return np.where(np.isfinite(values), values, np.nan)


def error_table(errors: dict[str, np.ndarray]) -> pd.DataFrame:
    """Convert PSNR values by video to a table with one row per frame and video, for a line plot."""
    rows = [(number + 1, value, name) for name, values in errors.items() for number, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["frame", "PSNR (dB)", "video"]).astype({"PSNR (dB)": float, "frame": int})


def action_table(actions: np.ndarray, names: list[str] | None) -> pd.DataFrame:
    """Convert actions (n, A) to a table with one row per action and component, for a line plot."""
    names = names or [f"action {index}" for index in range(actions.shape[1])]
    columns = zip(names, actions.T, strict=True)
    rows = [(row + 1, float(value), name) for name, column in columns for row, value in enumerate(column)]
    return pd.DataFrame(rows, columns=["frame", "action", "component"])
