"""Write any data source as a LeRobotDataset v3.0 with a dataset card, and publish it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..files import locked_folder, remove_abandoned, temporary_path
from ..json_files import read_json
from .episode import Episode, EpisodeSource, check_equal_size, first_readable
from .lerobot import INDEX_FEATURES, VERSION, LeRobotFolder
from .lerobot_writer import EPISODES_PATH, Regions, is_written, tile_regions, write_file, write_metadata
from .prepared import PreparedEpisodes

logger = logging.getLogger(__name__)

EPISODES_PER_FILE = 50
SOURCE_FILE = ".irasim-source.json"
"""File in a dataset folder that identifies the source of its episodes; the file is never published."""
DERIVATION_TEXTS = {
    "recorded": "as recorded; their relation to the states is unknown",
    "relative_euler": "motions in the frame of the previous pose: translation, and extrinsic xyz Euler angles of the rotation",
    "relative_6d": "motions in the frame of the previous pose: translation, and the first two columns of the rotation matrix",
    "relative_planar": "differences between successive states",
    "absolute": "absolute targets: the next state",
}
CARD = """
# {title}

This LeRobotDataset v3.0 contains {episodes} episodes with {frames} frames of {height}x{width} pixels (height x width) at
{fps:g} frames per second. The videos are lossless H.264{layout}.

| camera | height x width |
|---|---|
{cameras}

| feature | type | components |
|---|---|---|
{features}

Actions (`{derivation}`): {derivation_text}. Row k of `action` is the command at frame k; it drives the step that ends in
frame k + 1. The dataset was written by `irasim data` (irasim-diffusers). To train a world model on it:

```bash
accelerate launch examples/train.py --dataset {repo_id} --vae stabilityai/sdxl-vae --output_dir runs/model
```
"""


def write_lerobot(
    source: EpisodeSource,
    root: str | os.PathLike,
    *,
    robot_type: str = "unknown",
    camera: str = "observation.image",
    skip_broken: bool = False,
    on_episode: Callable[[int, str | None], None] = lambda number, error: None,
) -> LeRobotFolder:
    """Write every episode of a data source to a LeRobotDataset v3.0.

    An interrupted run resumes at the first missing file. Several cameras are written as separate features
    `observation.images.<name>`; names that start with `observation.` are kept. The folder stores the layout of the cameras, and how
    the actions follow from states; `LeRobotFolder` reads both.

    Args:
        source: The data source.
        root: The folder to write.
        robot_type: Name of the robot.
        camera: Feature key of the images of a single camera, or of tiled images that have been resized.
        skip_broken: Skip episodes that cannot be read, or whose frames differ in size from those of the first episode.
        on_episode: Function that is called with the index of each episode and the reason why it is skipped, or None. It is
            always None for episodes in files of an earlier run.

    Returns:
        The folder, with the camera layout of the source.

    Raises:
        ValueError: If the source has no valid frame rate, another process writes the folder, the folder contains anything else,
            none of the first 20 episodes can be read, an episode is broken or has another frame size and `skip_broken` is False, or
            the image of one of several cameras changes its size.
    """
    fps, root = _frame_rate(source), Path(root)
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    with locked_folder(root):
        _claim(root, json.loads(json.dumps(source.identity | {"fps": fps})))
        try:
            first = first_readable(source, lambda number: _read_episode(source, number))
            frame_size = first.frames.shape[1:3]
            derivation = getattr(source, "action_derivation", "recorded")
            metadata: dict[str, Any] = {
                "fps": fps,
                "camera": _camera_regions(source, camera, frame_size),
                "frame_size": frame_size,
                "names": _component_names(source, first),
                "robot_type": robot_type,
                "action_derivation": derivation,
                "action_units": getattr(source, "action_units", None) or _units(derivation, first.actions.shape[1]),
            }
            del first  # only one episode is held at a time
            _report_unread(source)
            tasks = _write_files(source, root, fps, metadata["camera"], frame_size, skip_broken, on_episode)
        except BaseException:
            if not any(root.glob("meta/episodes/*/*.parquet")):  # a repaired source can then be written to the folder
                _clear(root, remove=is_new)
            raise
        write_metadata(root, tasks=tasks, **metadata)
        return LeRobotFolder(root)


def _frame_rate(source: EpisodeSource) -> float:
    fps = source.fps
    if fps is None or not (math.isfinite(fps) and fps > 0):
        raise ValueError(
            f"{source.name!r} must have a positive finite frame rate, got {'none' if fps is None else fps}: pass `fps` (--fps)."
        )
    return fps


def _component_names(source: EpisodeSource, episode: Episode) -> dict[str, list[str]]:
    """Return the component names of all float features."""
    return {
        key: source.component_names(key) or [f"{key}.{index}" for index in range(values.shape[1])]
        for key, values in {"action": episode.actions, **episode.states}.items()
        if values.dtype.kind == "f"
    }


def _write_files(
    source: EpisodeSource,
    root: Path,
    fps: float,
    regions: str | Regions,
    frame_size: tuple[int, int],
    skip_broken: bool,
    on_episode: Callable[[int, str | None], None],
) -> list[str]:
    """Write the files that are missing; return the tasks of all files."""
    tasks: list[str] = []
    episodes = frames = 0

    def read(numbers: Iterable[int]) -> Iterator[Episode]:
        for number in numbers:
            try:
                episode = _read_episode(source, number, frame_size)
            except ValueError as error:
                if not skip_broken:
                    raise
                on_episode(number, str(error))
                continue
            on_episode(number, None)
            if episode.task not in tasks:
                tasks.append(episode.task)
            yield episode
            del episode  # before the next one is read

    for file_index, start in enumerate(range(0, len(source), EPISODES_PER_FILE)):
        numbers = range(start, min(start + EPISODES_PER_FILE, len(source)))
        if is_written(root, file_index):
            for number in numbers:
                on_episode(number, None)
        else:
            place = {"first_episode": episodes, "first_frame": frames}
            write_file(root, file_index, read(numbers), fps=fps, camera=regions, tasks=tasks, **place)
            if not is_written(root, file_index):  # all its episodes are broken
                continue
        path = root / EPISODES_PATH.format(chunk_index=0, file_index=file_index)
        rows = pq.read_table(path, columns=["tasks", "length"]).to_pylist()
        tasks[:] = dict.fromkeys([*tasks, *(task for row in rows for task in row["tasks"])])
        episodes, frames = episodes + len(rows), frames + sum(row["length"] for row in rows)
    return tasks


def _read_episode(source: EpisodeSource, number: int, frame_size: tuple[int, int] | None = None) -> Episode:
    """Read an episode with the features that are neither actions nor states.

    The frames must have the height and width `frame_size`, unless it is None.
    """
    episode = source[number]
    if frame_size is not None:
        remedy = "resize the videos, or skip the episode with `skip_broken` (--skip_broken)"
        check_equal_size(frame_size, episode.frames, f"episode {number} of {source.name!r}", remedy)
    flags = source.flags(number) if hasattr(source, "flags") else {}
    return dataclasses.replace(episode, states=episode.states | flags)


def _report_unread(source: Any) -> None:
    """Log a warning that names the features of a LeRobotDataset that are not written."""
    unread = {key: source.info["features"][key] for key in getattr(source, "unread_features", ())}
    if unread:
        found = ", ".join(f"{key!r} ({one['dtype']}, shape {one.get('shape')})" for key, one in unread.items())
        logger.warning(
            f"{source.name!r}: features that are not vectors, strings or images, or that the selected actions replace, are "
            f"omitted: {found}."
        )


def _camera_regions(source: EpisodeSource, camera: str, frame_size: tuple[int, int]) -> str | Regions:
    """Return the region of each camera's image by feature key, or `camera` if frames are not split."""
    names = [name for row in source.cameras for name in row]
    single: Any = _untiled(source)
    if len(names) == 1 or single is None:
        return camera
    sizes = {}
    for name in names:
        view = dataclasses.replace(single, cameras=((name,),))
        sizes[name] = first_readable(view, partial(view.window, start=0, length=1)).frames.shape[1:3]
    regions = tile_regions(source.cameras, sizes)
    if frame_size != tuple(max(region[axis].stop for region in regions.values()) for axis in (0, 1)):
        raise ValueError(
            f"images of the cameras of {source.name!r} must have one size in all episodes, got {sizes}: resize the videos."
        )
    return {
        name if name.startswith("observation.") else f"observation.images.{name.replace('/', '_')}": region
        for name, region in regions.items()
    }


def _untiled(source: Any) -> Any:
    """Return the underlying source, which can read single cameras; None if tiled frames are resized."""
    if isinstance(source, PreparedEpisodes):
        return None if source.frame_size is not None else _untiled(source.source)
    names: list[str] = [entry.name for entry in dataclasses.fields(source)] if dataclasses.is_dataclass(source) else []
    return source if "cameras" in names else None


def _units(derivation: str, width: int) -> list[str | None] | None:
    """Return the units of derived actions, which `actions.derive_actions` defines for motions of poses."""
    known = {"relative_euler": ["m"] * 3 + ["rad"] * 3, "relative_6d": ["m"] * 3 + ["1"] * 6}.get(derivation)
    return None if known is None else (known + [None] * width)[:width]


def _claim(root: Path, identity: dict) -> None:
    """Mark a folder as written from a source; raise ValueError if it contains something else."""
    marker = root / SOURCE_FILE
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        remove_abandoned(folder)
    written: object = None
    if marker.is_file():
        with suppress(ValueError):
            written = read_json(marker)
    if written != identity:
        if any(root.glob("meta/episodes/*/*.parquet")) or (
            not marker.is_file() and root.is_dir() and any(root.iterdir())
        ):
            raise ValueError(
                f"{str(root)!r} is not empty and was not written from this dataset with these settings: pass a new folder."
            )
        _clear(root)
        with temporary_path(marker) as temporary:
            temporary.write_text(json.dumps(identity), encoding="utf-8")


def _clear(root: Path, remove: bool = False) -> None:
    """Delete the files of an unsuccessful run and, with `remove`, the folder if it is then empty."""
    if (root / SOURCE_FILE).is_file():
        for name in ("data", "meta", "videos"):
            shutil.rmtree(root / name, ignore_errors=True)
        (root / SOURCE_FILE).unlink()
    if remove:
        with suppress(OSError):  # the folder contains other files
            root.rmdir()


def write_dataset_card(folder: LeRobotFolder, repo_id: str) -> None:
    """Write the dataset card, README.md, from the metadata of a LeRobotDataset.

    Args:
        folder: The dataset, as returned by `write_lerobot`.
        repo_id: Name of the dataset on the Hub, or of the folder.
    """
    features = folder.info["features"]
    units = folder.action_units or []
    rows = []
    for key, feature in features.items():
        if feature["dtype"] == "video" or key in INDEX_FEATURES:
            continue
        components = feature["names"] or [f"{key}.{index}" for index in range(feature["shape"][0])]
        if key == "action" and units:
            components = [f"{name} ({unit})" if unit else name for name, unit in zip(components, units, strict=True)]
        rows.append(f"| `{key}` | {feature['dtype']} | {', '.join(components)} |")
    sizes = {key: features[key]["shape"][:2] for row in folder.cameras for key in row}
    layout = "; ".join(", ".join(row) for row in folder.cameras)
    text = CARD.format(
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        episodes=len(folder),
        frames=folder.info["total_frames"],
        fps=folder.fps,
        height=sum(sizes[row[0]][0] for row in folder.cameras),
        width=sum(sizes[key][1] for key in folder.cameras[0]),
        layout=f". A frame consists of the images of all cameras, tiled by rows: {layout}" if len(sizes) > 1 else "",
        cameras="\n".join(f"| `{key}` | {height} x {width} |" for key, (height, width) in sizes.items()),
        features="\n".join(rows),
        derivation=folder.action_derivation,
        derivation_text=DERIVATION_TEXTS[folder.action_derivation],
    )
    data = DatasetCardData(
        task_categories=["robotics"],
        tags=["LeRobot", "world-model"],
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder.root / "README.md")


def publish_lerobot(folder: LeRobotFolder, repo_id: str) -> None:
    """Upload a LeRobotDataset v3.0 with the version tag that LeRobot requires."""
    hub = HfApi()
    hub.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    hub.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=folder.root, ignore_patterns=["*.partial*", SOURCE_FILE]
    )
    with suppress(RevisionNotFoundError):
        hub.delete_tag(repo_id, tag=VERSION, repo_type="dataset")
    hub.create_tag(repo_id, tag=VERSION, repo_type="dataset")
