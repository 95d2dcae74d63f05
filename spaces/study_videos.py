"""Videos of a preference study, read from a folder or predicted for a demonstration."""

import asyncio
import os
import secrets
import tempfile
from collections.abc import Awaitable, Callable
from itertools import islice
from pathlib import Path

import anyio.to_thread
import numpy as np
import torch
from comparison import Setting, pipeline_of, predict_whole
from preference_study import PreferenceStudy
from worlds import World, Worlds

from irasim_diffusers.data import iterate_video

TRUTH = "truth"
SUFFIXES = (".mp4", ".npz")
MAX_FRAMES = 400
DEMO_FRAMES = 15
DEMO_SAMPLERS = {"DDIM, 1 step": ("DDIMScheduler", 1), "Euler, 2 steps": ("EulerDiscreteScheduler", 2)}

Videos = Callable[[str, str], Awaitable[np.ndarray]]
"""Function that maps the name of a model, or `TRUTH`, and the name of a clip to frames (T, H, W, 3), uint8."""


def open_study(folder: str | Path) -> tuple[PreferenceStudy, Videos]:
    """Open a study of the videos in a folder; the answers are stored in the same folder.

    Args:
        folder: Contains a folder for each model, and `truth` with the ground truth. A clip has the same name in all of them,
            `<clip>.mp4`, or `<clip>.npz` as `irasim evaluate --save-predictions` writes it. The study rates the
            first model in alphabetical order.

    Raises:
        ValueError: If the folder has no ground truth, fewer than two models, or no clip common to all of them.
    """
    folder = Path(folder)
    folders = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    files = {each.name: _clips(each) for each in folders}
    models = [name for name in files if name != TRUTH and files[name]]
    if len(models) < 2 or not files.get(TRUTH):
        raise ValueError(
            f"`study` must be a folder with videos in {TRUTH}/ and in a folder for each of two or more models, got "
            f"{str(folder)!r} with {', '.join(files) or 'no folders'}."
        )
    clips = sorted(set.intersection(*(set(files[name]) for name in (TRUTH, *models))))
    if not clips:
        raise ValueError(
            f"`study` must have at least one clip name common to {', '.join((TRUTH, *models))}, got none."
        )

    async def videos(model: str, clip: str) -> np.ndarray:
        return await anyio.to_thread.run_sync(_read, files[model][clip])

    return PreferenceStudy(folder, clips, models[0], models[1:]), videos


def _clips(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.name[0] != "."}


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return file["frames"][:MAX_FRAMES]
    return np.stack(list(islice(iterate_video(path), MAX_FRAMES)))


def owner_key(folder: str | None) -> str | None:
    """Return the key for a study's results: IRASIM_STUDY_KEY, or a random one that is printed.

    A demonstration, which has no folder, has no key.
    """
    if not folder:
        return None
    key = os.environ.get("IRASIM_STUDY_KEY")
    if not key:
        key = secrets.token_urlsafe(8)
        print(f"Key for the results of the study: {key}", flush=True)  # noqa: T201
    return key


def find_demonstration(worlds: Worlds) -> tuple[PreferenceStudy, Videos] | None:
    """Create the demonstration of the first model that supports it; None if no model does."""
    for _, world in worlds.items():
        try:
            return demonstration(world, tempfile.mkdtemp(prefix="irasim-demonstration-"))
        except ValueError:
            continue
    return None


def demonstration(world: World, folder: str | Path) -> tuple[PreferenceStudy, Videos]:
    """Create a small study of two samplers of one model on parts of its example clip.

    Each video is predicted separately when it is first shown, so that raters and driving visitors wait for at most one clip.

    Args:
        world: The model, with its example clip.
        folder: Folder of the answers.

    Raises:
        ValueError: If the model has no example clip with actions, the clip is too short, or the model does not accept the samplers.
    """
    if world.clip is None or world.clip_actions is None:
        raise ValueError(f"{world.name} has no example clip with actions for the demonstration of a study.")
    clip, actions = world.clip, world.clip_actions
    history = world.pipeline.transformer.config.num_history_frames
    ends = np.arange(max(history, world.clip_history), len(clip) - DEMO_FRAMES + 1, DEMO_FRAMES)
    names = {f"frame {end}": end for end in ends}
    settings = {name: Setting(world, *sampler, seed=0) for name, sampler in DEMO_SAMPLERS.items()}
    pipelines = {name: pipeline_of(setting) for name, setting in settings.items()}
    predicted: dict[tuple[str, str], np.ndarray] = {}
    predicting = asyncio.Lock()

    def predict(model: str, end: int) -> np.ndarray:
        taken = actions[end - world.clip_history :][:DEMO_FRAMES]
        generator = torch.Generator().manual_seed(int(end))
        return predict_whole(pipelines[model], settings[model], clip[end - history : end], taken, generator)[0]

    async def videos(model: str, name: str) -> np.ndarray:
        end = names[name]
        if model == TRUTH:
            return clip[end - history : end + DEMO_FRAMES]
        async with predicting:
            if (model, name) not in predicted:
                predicted[model, name] = await world.run_long(predict, model, end)
        return np.concatenate([clip[end - history : end], predicted[model, name]])

    first, *others = DEMO_SAMPLERS
    return PreferenceStudy(folder, list(names), first, others), videos
