"""Resumable work of the Push-T study: stages with checked settings, and jobs that each write one file."""

import functools
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from irasim_diffusers.files import read_json, temporary_path

RESULT, SETTING = "result.json", "setting.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(path) as partial:
        partial.write_text(json.dumps(value, indent=2), encoding="utf-8")


def fingerprint(folder: Path) -> str:
    """Hash the weights and configs of a model folder, so that replaced weights are detected."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("config.json")]):
        if "checkpoint-" not in str(path.relative_to(folder)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_stage(folder: Path, setting: Mapping[str, Any], work: Callable[[], Any]) -> Any:
    """Return the result of a stage; `work` is called only if the folder has no complete result.

    Args:
        folder: Folder of the stage.
        setting: Everything that determines the result, JSON-serializable.
        work: Computes the result. It may resume from files in the folder that an interrupted run has left.

    Raises:
        ValueError: If the folder contains a stage with other settings.
    """
    wanted = json.loads(json.dumps(setting))
    if (folder / SETTING).is_file():
        found = read_json(folder / SETTING)
        differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if differing:
            first = differing[0]
            raise ValueError(
                f"the stage {folder.name!r} in {str(folder.parent)!r} was computed with other settings: {', '.join(differing)} "
                f"differ, `{first}` was {found.get(first)!r} and is {wanted.get(first)!r}. Use a new `output_dir`, or compute "
                f"it again with `--redo {folder.name}`."
            )
    else:
        write_json(folder / SETTING, wanted)
    if not (folder / RESULT).is_file():
        write_json(folder / RESULT, work())
    return read_json(folder / RESULT)


def remove_stage(folder: Path) -> None:
    """Delete a stage; the settings go last, so that an interrupted deletion is noticed."""
    for path in sorted(folder.glob("*"), key=lambda path: path.name == SETTING):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_jobs(
    folder: Path, function: Callable[..., Any], jobs: Mapping[str, Mapping[str, Any]], num_workers: int
) -> dict[str, Any]:
    """Call a function for each job; finished jobs are skipped.

    Each result is written to `<folder>/jobs/<name>.json`.

    Args:
        folder: Folder of the stage.
        function: Function of a module, called with the arguments of a job; returns a JSON-serializable value.
        jobs: Arguments by name. A result must depend on the arguments only, not on other jobs.
        num_workers: Number of processes; 1 runs the jobs in this process.

    Returns:
        The results by name.
    """
    paths = {name: folder / "jobs" / f"{name}.json" for name in jobs}
    missing = [name for name in jobs if not paths[name].is_file()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=folder.name, unit="job") as bar:
        if num_workers == 1:
            for name in missing:
                write_json(paths[name], function(**jobs[name]))
                bar.update()
        elif missing:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_workers, context, functools.partial(torch.set_num_threads, 1)) as pool:
                running = {pool.submit(function, **jobs[name]): name for name in missing}
                try:
                    for future in as_completed(running):
                        write_json(paths[running[future]], future.result())
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return {name: read_json(path) for name, path in paths.items()}
