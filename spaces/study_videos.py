"""The videos of a preference study: those in a folder, or a demonstration made with the embedded model."""

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
from worlds import World, Worlds

from irasim_diffusers.data import iterate_video
from irasim_diffusers.evaluation import PreferenceStudy

TRUTH = "truth"
SUFFIXES = (".mp4", ".npz")
MAX_FRAMES = 400
DEMO_FRAMES = 15
DEMO_SAMPLERS = {"DDIM, 2 steps": ("DDIMScheduler", 2), "PNDM, 4 steps": ("PNDMScheduler", 4)}

Videos = Callable[[str, str], Awaitable[np.ndarray]]
"""Takes a model's name, or `TRUTH`, and a clip's; gives its frames (T, H, W, 3), uint8."""


def find_study(folder: str | None, worlds: Worlds) -> tuple[PreferenceStudy, Videos] | None:
    """The study of a folder; without one the demonstration of the first model that can serve for it, if any."""
    if folder:
        return open_study(folder)
    for name, world in worlds.items():
        try:
            return demonstration(world, Path(tempfile.gettempdir()) / f"irasim-demonstration-{Path(name).name}")
        except ValueError:
            continue
    return None


def owner_key(folder: str | None) -> str | None:
    """What the owner of a folder's study must give to see its results: IRASIM_STUDY_KEY, or one that is printed."""
    if not folder:
        return None
    key = os.environ.get("IRASIM_STUDY_KEY")
    if not key:
        key = secrets.token_urlsafe(8)
        print(f"The results of the study are shown to who gives this key: {key}", flush=True)  # noqa: T201
    return key


def open_study(folder: str | Path) -> tuple[PreferenceStudy, Videos]:
    """The study of a folder's videos; its answers are kept there too.

    Args:
        folder: Holds one folder for each model and one, `truth`, for what truly happened; a clip has the same name in all,
            `<clip>.mp4`, or `<clip>.npz` as `irasim evaluate --save-predictions` writes. The rates are of the first model by name.

    Raises:
        ValueError: If the truth, two models, or clips that all of them have are missing.
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
        raise ValueError(f"`study` must have clips of one name in all of {', '.join((TRUTH, *models))}, got none.")

    async def videos(model: str, clip: str) -> np.ndarray:
        return await anyio.to_thread.run_sync(_read, files[model][clip])

    return PreferenceStudy(folder, clips, models[0], models[1:]), videos


def _clips(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return file["frames"][:MAX_FRAMES]
    return np.stack(list(islice(iterate_video(path), MAX_FRAMES)))


def demonstration(world: World, folder: str | Path) -> tuple[PreferenceStudy, Videos]:
    """A small study of two samplers of one model on parts of its example clip, predicted when they are first asked for.

    Args:
        world: The model, with its example clip.
        folder: Where answers are kept.

    Raises:
        ValueError: If the model has no example clip with actions, or does not take the samplers.
    """
    if world.clip is None or world.clip_actions is None:
        raise ValueError(f"{world.name} has no example clip with actions to demonstrate a study on.")
    clip, actions = world.clip, world.clip_actions
    history = world.pipeline.transformer.config.num_history_frames
    ends = np.arange(max(history, world.clip_history), len(clip) - DEMO_FRAMES + 1, DEMO_FRAMES)
    names = [f"frame {end}" for end in ends]
    seen, follow = np.arange(-history, 0), np.arange(DEMO_FRAMES)
    histories, truths = clip[ends[:, None] + seen], clip[ends[:, None] + follow]
    taken = actions[ends[:, None] - world.clip_history + follow]
    settings = {name: Setting(world, *sampler, seed=0) for name, sampler in DEMO_SAMPLERS.items()}
    pipelines = {name: pipeline_of(setting) for name, setting in settings.items()}
    futures = {TRUTH: truths}
    making = asyncio.Lock()

    def predict(name: str) -> np.ndarray:
        generators = [torch.Generator().manual_seed(number) for number in range(len(ends))]
        return predict_whole(pipelines[name], settings[name], histories, taken, generators)

    async def videos(model: str, clip: str) -> np.ndarray:
        async with making:
            if model not in futures:
                futures[model] = await world.run(predict, model)
        place = names.index(clip)
        return np.concatenate([histories[place], futures[model][place]])

    first, *others = DEMO_SAMPLERS
    return PreferenceStudy(folder, names, first, others), videos
