"""Resumable stages and jobs of the Push-T study."""

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

from irasim_diffusers.files import write_text
from irasim_diffusers.json_files import read_json, read_json_object

RESULT, SETTING = "result.json", "setting.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2))


def fingerprint(folder: Path) -> str:
    """Return a hash of the weights and configs of a model folder, to detect replaced weights."""
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
        work: Function that computes the result. It may resume from files that an interrupted run has left in the folder.

    Raises:
        ValueError: If the folder contains results of other settings.
    """
    wanted = json.loads(json.dumps(setting))
    if (folder / SETTING).is_file():
        found = read_json_object(folder / SETTING)
        differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if differing:
            first = differing[0]
            was, now = (
                "not set" if given.get(first) is None else f"{given[first]!r:.80}" for given in (found, wanted)
            )
            raise ValueError(
                f"the stage {folder.name!r} in {str(folder.parent)!r} was computed with other settings ({', '.join(differing)}): "
                f"`{first}` was {was} and is {now}. Use a new `output_dir`, or compute the stage again with `--redo {folder.name}`."
            )
    else:
        write_json(folder / SETTING, wanted)
    if not (folder / RESULT).is_file():
        write_json(folder / RESULT, work())
    return read_json(folder / RESULT)


def remove_stage(folder: Path) -> None:
    """Delete the files of a stage; the settings are deleted last, so that an interruption is detected."""
    for path in sorted(folder.glob("*"), key=lambda path: path.name == SETTING):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_jobs(
    folder: Path, function: Callable[..., Any], jobs: Mapping[str, Mapping[str, Any]], num_workers: int
) -> dict[str, Any]:
    """Call a function for each job that is not finished, and return the results of all jobs.

    Each result is written to `<folder>/jobs/<name>.json`.

    Args:
        folder: Folder of the stage.
        function: Module-level function that receives the arguments of a job and returns a JSON-serializable value.
        jobs: Arguments of each job, by name. A result must depend only on the arguments of its job.
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
