"""Any data source as a LeRobotDataset v3.0 with a data set card, to keep or to publish."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..files import temporary_path
from .episode import Episode, EpisodeSource, first_readable
from .lerobot import VERSION, LeRobotFolder
from .lerobot_writer import EPISODES_PATH, is_written, write_file, write_metadata

EPISODES_PER_FILE = 50
SOURCE_FILE = ".irasim-source.json"
"""Says in a folder that `write_lerobot` writes what it is written from."""
CARD = """
# {title}

{episodes} episodes, {frames} frames of {height}x{width} pixels at {fps:g} frames a second, as a LeRobotDataset v3.0.
Pictures are lossless H.264{cameras}.

| feature | components |
|---|---|
{features}

Action row k is the command given at frame k; it drives the step that ends in frame k + 1. Written by `irasim data` of
[irasim-diffusers](https://pypi.org/project/irasim-diffusers), which trains world models on it:

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
    """Write every episode of a source into a LeRobotDataset v3.0; an interrupted run goes on with the file missing.

    Args:
        source: The data source; several cameras stay tiled in one picture.
        root: The folder to write.
        robot_type: Name of the robot.
        camera: Feature key of the pictures.
        skip_broken: Leave out episodes that cannot be read.
        on_episode: Called with the number of each episode, and why it was skipped.

    Returns:
        The folder.

    Raises:
        ValueError: If the source records no frame rate, the folder holds another data set, an episode is broken, or none
            of the first can be read.
    """
    if source.fps is None:
        raise ValueError(f"{source.name!r} records no frames a second: give `fps`.")
    root = Path(root)
    marker, identity = root / SOURCE_FILE, json.loads(json.dumps(source.identity | {"fps": source.fps}))
    begun = json.loads(marker.read_text()) if marker.is_file() else None
    if begun not in (None, identity) or (begun is None and root.is_dir() and any(root.iterdir())):
        raise ValueError(f"{str(root)!r} holds another data set, or the same with other settings: give a new folder.")
    first = first_readable(source, source.__getitem__)
    height, width = first.frames.shape[1:3]
    vectors = {"action": first.actions, **first.states}
    names = {
        key: source.component_names(key) or [f"{key}.{index}" for index in range(value.shape[1])]
        for key, value in vectors.items()
    }
    del first
    with temporary_path(marker) as partial:
        partial.write_text(json.dumps(identity))
    tasks: list[str] = []
    written = frames = 0

    def read(numbers: Iterable[int]) -> Iterator[Episode]:
        for number in numbers:
            try:
                episode = source[number]
            except ValueError as error:
                if not skip_broken:
                    raise
                on_episode(number, str(error))
                continue
            on_episode(number, None)
            if episode.task not in tasks:
                tasks.append(episode.task)
            yield episode
            del episode  # before the next is read

    for file_index, start in enumerate(range(0, len(source), EPISODES_PER_FILE)):
        numbers = range(start, min(start + EPISODES_PER_FILE, len(source)))
        if not is_written(root, file_index):
            write_file(
                *(root, file_index, read(numbers)),
                fps=source.fps,
                camera=camera,
                tasks=tasks,
                first_episode=written,
                first_frame=frames,
            )
            if not is_written(root, file_index):  # all its episodes are broken
                continue
        else:
            for number in numbers:
                on_episode(number, None)
        rows = pq.read_table(
            root / EPISODES_PATH.format(chunk_index=0, file_index=file_index), columns=["tasks", "length"]
        ).to_pylist()
        tasks += [task for row in rows for task in row["tasks"] if task not in tasks]
        written, frames = written + len(rows), frames + sum(row["length"] for row in rows)
    write_metadata(
        root,
        fps=source.fps,
        camera=camera,
        frame_size=(height, width),
        names=names,
        tasks=tasks,
        robot_type=robot_type,
    )
    return LeRobotFolder(root)


def write_dataset_card(folder: LeRobotFolder, repo_id: str, cameras: str = "") -> None:
    """Write README.md of a LeRobotDataset: what it holds, written from its own metadata."""
    features = folder.info["features"]
    (key,) = [key for row in folder.cameras for key in row]
    height, width, _ = features[key]["shape"]
    vectors = [name for name, feature in features.items() if feature["dtype"] == "float32" and feature["names"]]
    text = CARD.format(
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        episodes=len(folder),
        frames=folder.info["total_frames"],
        height=height,
        width=width,
        fps=folder.fps,
        cameras=cameras,
        features="\n".join(f"| `{name}` | {', '.join(features[name]['names'])} |" for name in vectors),
    )
    data = DatasetCardData(
        task_categories=["robotics"],
        tags=["LeRobot", "world-model"],
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder.root / "README.md")


def publish_lerobot(folder: LeRobotFolder, repo_id: str) -> None:
    """Upload a LeRobotDataset with the tag of its version, which LeRobot asks for."""
    hub = HfApi()
    hub.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    hub.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=folder.root, ignore_patterns=["*.partial*", SOURCE_FILE]
    )
    with suppress(RevisionNotFoundError):
        hub.delete_tag(repo_id, tag=VERSION, repo_type="dataset")
    hub.create_tag(repo_id, tag=VERSION, repo_type="dataset")
