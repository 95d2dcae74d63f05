"""Read data in the format of the IRASim release and its variants.

A folder contains `annotation/<split>/<id>.json`, mp4 files and possibly SDXL latents. Annotations have `actions` (Language-Table),
`state` and `continuous_gripper_state` (RT-1, Bridge), or `states` (DROID as preprocessed by Ctrl-World). Reference:
https://github.com/bytedance/IRASim.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..actions import derive_actions
from ..json_files import read_json
from ..safe_load import FLOATS, read_torch_file
from .columns import finite_vector
from .content_hash import media_stamp
from .episode import (
    Episode,
    InOrder,
    camera_layout,
    check_max_episodes,
    first_readable,
    first_task,
    tile,
    window_slice,
)
from .record_files import path_inside
from .video import count_frames, read_frames

logger = logging.getLogger(__name__)

MEDIA_ENTRY = re.compile(rb'"(video|latent_video)_path"\s*:\s*("(?:[^"\\]|\\.)*")')
"""The entry of a video or of latents in an annotation, with the JSON string of its path."""


@dataclass(frozen=True)
class IRASimFolder(InOrder):
    """A dataset in the format of the IRASim release.

    Actions that are derived from poses consist of the motion in the frame of the previous pose and the next gripper state; see
    `actions.derive_actions`. The last action has no next frame and is set to no motion. A video may have one more frame
    than its annotation; this frame is ignored, and a warning is logged once.

    Args:
        root: The folder that contains `annotation`.
        split: Name of the split, for example `train`.
        cameras: Camera indices as strings: one camera, several stacked cameras, or rows of cameras; None selects the only one.
            After construction, the layout as a tuple of rows.
        fps: Frames per second, which the format does not record.
        max_episodes: Maximum number of episodes, counted from the first.

    Raises:
        ValueError: If `max_episodes` is less than 1, the split does not exist, none of its first 20 annotations can be read, or a
            camera is missing or ambiguous.
    """

    root: Path
    split: str = "train"
    cameras: Any = None
    fps: float | None = None
    max_episodes: int | None = None

    def __post_init__(self) -> None:
        check_max_episodes(self.max_episodes)
        object.__setattr__(self, "root", Path(self.root))
        if not self.files:
            splits = sorted({path.parent.name for path in (self.root / "annotation").glob("*/[!.]*.json")})
            if not splits:
                raise ValueError(f"{str(self.root)!r} has no annotation 'annotation/<split>/<id>.json'.")
            raise ValueError(f"`split` must be one of {splits} in {str(self.root)!r}, got {self.split!r}.")
        known = [str(number) for number in range(len(_media(self._first, "video")))]
        if self.cameras is None and len(known) != 1:
            raise ValueError(
                f"`cameras` must name one or more of {known} in {self.name!r}, got none: pass `cameras` (--cameras)."
            )
        layout = camera_layout(known[0] if self.cameras is None else self.cameras)
        for camera in [camera for row in layout for camera in row]:
            if camera not in known:
                raise ValueError(f"`cameras` must be among {known} in {self.name!r}, got {camera!r}.")
        object.__setattr__(self, "cameras", layout)

    @property
    def name(self) -> str:
        """The folder of the split's annotations."""
        return str(self.root / "annotation" / self.split)

    @cached_property
    def files(self) -> list[Path]:
        """The annotation files, sorted by number, then by name; hidden files are ignored."""

        def order(path: Path) -> tuple[bool, int, str]:
            return not path.stem.isdigit(), int(path.stem) if path.stem.isdigit() else 0, path.stem

        return sorted((self.root / "annotation" / self.split).glob("[!.]*.json"), key=order)[: self.max_episodes]

    @cached_property
    def _first(self) -> dict[str, Any]:
        """The first annotation that can be read; broken ones are reported when they are read."""
        return first_readable(self, self._annotation)

    @property
    def action_derivation(self) -> str:
        """`"recorded"` if the annotations contain `actions`, else `"relative_euler"`."""
        return "recorded" if "actions" in self._first else "relative_euler"

    @property
    def identity(self) -> dict[str, Any]:
        """Cameras, and a hash of the annotations and of the stamps of their videos and latents."""
        cameras = [int(camera) for row in self.cameras for camera in row]
        root, digest = str(self.root), hashlib.sha256()
        for file in self.files:
            content = file.read_bytes()
            stamps = [media_stamp(os.path.join(root, path)) for path in _media_files(content, cameras)]
            digest.update(json.dumps([file.name, hashlib.sha256(content).hexdigest(), stamps]).encode())
        return {"cameras": self.cameras, "files": digest.hexdigest()}

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.files)

    def __getitem__(self, number: int) -> Episode:
        """Read one episode.

        Raises:
            ValueError: If a file is missing, unreadable or outside the folder, an entry or a number of the annotation is missing or
                invalid, the numbers of frames and actions disagree, or the images of the cameras cannot be tiled.
        """
        return self._read(number, None)

    def window(self, number: int, start: int, length: int) -> Episode:
        """Read a part of an episode; avoid decoding other frames.

        Args:
            number: Index of the episode.
            start: First frame.
            length: Number of frames.

        Raises:
            ValueError: If the episode is broken, or the window is empty or exceeds it.
        """
        return self._read(number, (start, length))

    def _read(self, number: int, window: tuple[int, int] | None) -> Episode:
        annotation = self._annotation(number)
        vectors = self.vectors(number)
        total = len(vectors["action"])
        try:
            part = window_slice(*(window or (0, total)), total)
            paths = {
                name: path_inside(self.root, _media_path(annotation, "video", name))
                for row in self.cameras
                for name in row
            }
            for path in paths.values():
                self._check_length(path, total, annotation)
            count = part.stop - part.start
            frames = tile(self.cameras, {name: read_frames(path, part.start, count) for name, path in paths.items()})
            task = first_task(annotation.get("texts") or annotation.get("language_instruction"))
        except ValueError as error:
            raise ValueError(f"{str(self.files[number])!r}: {error}") from error
        vectors = {key: value[part] for key, value in vectors.items()}
        return Episode(frames, vectors.pop("action"), vectors, task)

    def _check_length(self, path: Path, total: int, annotation: dict[str, Any]) -> None:
        """Check that a video has as many frames as its annotation, or one more."""
        found = count_frames(path)
        if found == total + 1:
            if not self.__dict__.get("_reported"):
                logger.warning(
                    f"{str(path)!r} has one more frame than the {total} in its annotation: the last frame is ignored."
                )
                self.__dict__["_reported"] = True
        elif found != total:
            announced = f" ('video_length' is {annotation['video_length']})" if "video_length" in annotation else ""
            raise ValueError(
                f"{found} frames must have {found - 1} actions between them, got {total - 1}, in {str(path)!r}{announced}: fix the "
                "annotation, or remove the episode."
            )

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """Read `action` (T, A) and, if actions are derived from poses, `state` (T, S) of one episode, float32.

        Raises:
            ValueError: If the annotation cannot be read, or an entry or a number is missing or invalid.
        """
        annotation = self._annotation(number)
        try:
            return _vectors(annotation)
        except ValueError as error:
            raise ValueError(f"{str(self.files[number])!r}: {error}") from error

    def component_names(self, key: str) -> list[str] | None:
        """Names of the components: x and y, or position, Euler angles and gripper; None if unknown.

        Raises:
            ValueError: If none of the first 20 episodes has valid actions.
        """
        names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
        width = first_readable(self, self.vectors)[key].shape[1]
        if self.action_derivation == "recorded":
            return names[:2] if width == 2 else None
        return names if width == len(names) else None

    def latents(self, number: int) -> torch.Tensor | None:
        """Read the recorded latents (T, C, h, w) of one episode, scaled by the autoencoder's factor.

        Returns:
            The latents; None if there are none, or if several cameras are tiled.

        Raises:
            ValueError: If the annotation or the file cannot be read, the annotation names only latents of other cameras, or the
                file does not contain finite latents of this episode.
        """
        annotation = self._annotation(number)
        camera, *others = [camera for row in self.cameras for camera in row]
        if others or not _media(annotation, "latent_video"):
            return None
        length = len(self.vectors(number)["action"])
        try:
            path = path_inside(self.root, _media_path(annotation, "latent_video", camera))
            return _read_latents(path, length) if path.is_file() else None
        except ValueError as error:
            raise ValueError(f"{str(self.files[number])!r}: {error}") from error

    def _annotation(self, number: int) -> dict[str, Any]:
        path = self.files[number]
        annotation = read_json(path)
        if not isinstance(annotation, dict) or not _media(annotation, "video"):
            raise ValueError(f"{str(path)!r} must name a video in 'video_path' or 'videos'.")
        return annotation


def _media(annotation: dict[str, Any], kind: str) -> list[Any]:
    """Return the paths of `video` or `latent_video` of all cameras, from one string or a list of records."""
    if f"{kind}_path" in annotation:
        return [annotation[f"{kind}_path"]]
    records = annotation.get(f"{kind}s")
    if not isinstance(records, list):
        return []
    return [record.get(f"{kind}_path") if isinstance(record, dict) else None for record in records]


def _media_files(content: bytes, cameras: Sequence[int]) -> list[str]:
    """Return the paths of videos and latents of some cameras, without parsing an annotation's numbers."""
    found: dict[bytes, list[bytes]] = {b"video": [], b"latent_video": []}
    for kind, path in MEDIA_ENTRY.findall(content):
        found[kind].append(path)
    with suppress(ValueError):  # errors are reported when the episode is read
        return [json.loads(paths[camera]) for paths in found.values() for camera in cameras if camera < len(paths)]
    return []


def _media_path(annotation: dict[str, Any], kind: str, camera: str) -> str:
    """Return the path of the video or the latents of one camera."""
    paths = _media(annotation, kind)
    if int(camera) >= len(paths) or not isinstance(paths[int(camera)], str):
        raise ValueError(f"camera {camera} has no {kind}_path.")
    return paths[int(camera)]


def _read_latents(path: Path, length: int) -> torch.Tensor:
    """Read the latents of `length` frames from a file with one latent per frame, or one more.

    The file contains only the latents, or a dictionary with the latents as `obs`.
    """
    content = read_torch_file(path)
    latents = content.get("obs") if isinstance(content, dict) else content
    if not torch.is_tensor(latents) or latents.ndim != 4 or len(latents) not in (length, length + 1):
        found = tuple(latents.shape) if torch.is_tensor(latents) else "no tensor"
        raise ValueError(f"{str(path)!r} must contain latents ({length}, C, h, w), alone or as 'obs', got {found}.")
    if latents.dtype not in FLOATS or latents.layout != torch.strided:
        raise ValueError(
            f"{str(path)!r} must contain dense floating-point latents of 16 to 64 bits, got {latents.dtype} ({latents.layout})."
        )
    latents = latents[:length].to(
        torch.float32, copy=True
    )  # copy, because the file is memory-mapped and may be replaced
    if not torch.isfinite(latents).all():
        raise ValueError(f"{str(path)!r} must contain finite latents, got NaN or infinity: encode the video again.")
    return latents


def _vectors(annotation: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return `action` and, if actions are derived from poses, `state` of an annotation."""
    if "actions" in annotation:
        between, vectors = _numbers(annotation, "actions"), {}
        if between.ndim != 2:
            raise ValueError(f"'actions' must be (n, A), got {between.shape}.")
        last = np.zeros_like(between[:1])
    else:
        states = _states(annotation)
        vectors = {"state": finite_vector(states, "state")}
        between = derive_actions(states, "relative_euler")
        last = np.concatenate([np.zeros((1, 6)), states[-1:, 6:]], axis=1)
    return {"action": finite_vector(np.concatenate([between, last]), "action")} | vectors


def _states(annotation: dict[str, Any]) -> np.ndarray:
    """Return the poses and gripper states (T, S) of an annotation; S is 7 unless `states` differs."""
    if "states" in annotation:
        return _numbers(annotation, "states")
    if "state" in annotation and "continuous_gripper_state" in annotation:
        poses = _numbers(annotation, "state")
        gripper = _numbers(annotation, "continuous_gripper_state").reshape(-1, 1)
        if poses.ndim != 2 or len(poses) != len(gripper) or poses.shape[1] < 6:
            raise ValueError(
                f"'state' must be ({len(gripper)}, 6), one pose per 'continuous_gripper_state', got {poses.shape}."
            )
        return np.concatenate([poses[:, :6], gripper], axis=1)
    raise ValueError(
        "an annotation must have 'actions', 'states', or 'state' and 'continuous_gripper_state', got only "
        f"{', '.join(sorted(annotation))}."
    )


def _numbers(annotation: dict[str, Any], key: str) -> np.ndarray:
    try:
        values = np.asarray(annotation[key])
    except ValueError as error:
        raise ValueError(f"{key!r} must be numbers in rows of equal length: {error}") from error
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{key!r} must be numbers in rows of equal length, got values of type {values.dtype}.")
    if values.ndim == 0:
        raise ValueError(f"{key!r} must be numbers in rows of equal length, got {values.item()!r}.")
    return values.astype(np.float64)
