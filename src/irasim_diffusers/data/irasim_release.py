"""The data format of the IRASim release, in the flavours that it and its followers wrote.

A folder holds `annotation/<split>/<id>.json` beside mp4 files and, where they were computed, SDXL latents. What an
annotation holds tells its flavour: `actions` (Language-Table), `state` and `continuous_gripper_state` (RT-1, Bridge), or
`states` (DROID as cut by Ctrl-World). Reference: https://github.com/bytedance/IRASim.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
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
from .episode import Episode, InOrder, camera_layout, first_readable, tile, window_slice
from .video import read_frames, read_video

MEDIA_ENTRY = re.compile(rb'"(video|latent_video)_path"\s*:\s*("(?:[^"\\]|\\.)*")')
"""Where an annotation names a video or latents, and the JSON string of the path."""


@dataclass(frozen=True)
class IRASimFolder(InOrder):
    """A data set in the format of the IRASim release.

    Actions of poses are the motion in the frame of the previous pose and the gripper's next opening; see
    `actions.derive_actions`. The last row of `actions`, which leads out of the episode, asks for no motion.

    Args:
        root: The folder that holds `annotation`.
        split: Name of the split, `train` for example.
        cameras: Numbers of the cameras as strings, one, several that are stacked, or rows of them; None takes the only
            one. After construction the layout, a tuple of rows.
        fps: Frames a second, which the format does not record.
        max_episodes: Use only the first that many episodes.

    Raises:
        ValueError: If there is no such split, or a camera is missing or ambiguous.
    """

    root: Path
    split: str = "train"
    cameras: Any = None
    fps: float | None = None
    max_episodes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        if not self.files:
            splits = sorted(path.name for path in (self.root / "annotation").glob("*") if path.is_dir())
            raise ValueError(
                f"`split` must be one of {splits} in {str(self.root)!r}, got {self.split!r} (--split, --validation_split)."
            )
        known = [str(number) for number in range(len(_media(self._first, "video")))]
        if self.cameras is None and len(known) != 1:
            raise ValueError(f"`cameras` must name one or more of {known} in {self.name!r}.")
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
        """The annotations, numbered ones by number."""

        def order(path: Path) -> tuple[bool, int, str]:
            return not path.stem.isdigit(), int(path.stem) if path.stem.isdigit() else 0, path.stem

        return sorted((self.root / "annotation" / self.split).glob("*.json"), key=order)[: self.max_episodes]

    @cached_property
    def _first(self) -> dict[str, Any]:
        """The first annotation that can be read; broken ones are named when their turn comes."""
        return first_readable(self, self._annotation)

    @property
    def action_derivation(self) -> str:
        """`"relative_euler"` where poses are recorded, else `"recorded"`."""
        return "recorded" if "actions" in self._first else "relative_euler"

    @property
    def identity(self) -> dict[str, Any]:
        """Cameras, and a hash of the annotations and of the sizes of their videos and latents."""
        cameras = [int(camera) for row in self.cameras for camera in row]
        root, digest = str(self.root), hashlib.sha256()
        for file in self.files:
            content = file.read_bytes()
            sizes = [_size(os.path.join(root, path)) for path in _media_files(content, cameras)]
            digest.update(json.dumps([file.name, hashlib.sha256(content).hexdigest(), sizes]).encode())
        return {"cameras": self.cameras, "files": digest.hexdigest()}

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.files)

    def __getitem__(self, number: int) -> Episode:
        """One episode.

        Raises:
            ValueError: If a file is missing or unreadable, or frames and actions disagree.
        """
        return self._read(number, None)

    def window(self, number: int, start: int, length: int) -> Episode:
        """Frames of an episode from frame `start` on, with what goes with them; no others are decoded in vain.

        Raises:
            ValueError: As for the episode, or if the window does not lie within it.
        """
        return self._read(number, (start, length))

    def _read(self, number: int, window: tuple[int, int] | None) -> Episode:
        annotation = self._annotation(number)
        vectors = self.vectors(number)
        total = len(vectors["action"])
        try:
            part = window_slice(*(window or (0, total)), total)
            views = {}
            for camera in [camera for row in self.cameras for camera in row]:
                path = self.root / _media_path(annotation, "video", camera)
                if window is None:
                    views[camera] = read_video(path)
                else:
                    views[camera] = read_frames(path, part.start, part.stop - part.start, whole=part.stop == total)
            frames = tile(self.cameras, views)
            if len(frames) != part.stop - part.start:
                raise ValueError(f"{len(frames)} frames want {len(frames) - 1} actions between them, got {total - 1}.")
        except ValueError as error:
            raise ValueError(f"{str(self.files[number])!r}: {error}") from error
        texts = annotation.get("texts") or [annotation.get("language_instruction") or ""]
        vectors = {key: value[part] for key, value in vectors.items()}
        return Episode(frames, vectors.pop("action"), vectors, texts[0])

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """`action` (T, A) and, where poses are recorded, `state` (T, 7) of one episode, float32."""
        annotation = self._annotation(number)
        try:
            return _vectors(annotation)
        except ValueError as error:
            raise ValueError(f"{str(self.files[number])!r}: {error}") from error

    def component_names(self, key: str) -> list[str] | None:
        """Planar x and y; or position, Euler angles and gripper of the rest."""
        names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
        width = first_readable(self, self.vectors)[key].shape[1]
        if self.action_derivation == "recorded":
            return names[:2] if width == 2 else None
        return names if width == len(names) else None

    def latents(self, number: int) -> torch.Tensor | None:
        """Latents (T, C, h, w) of one episode that lie beside its video, scaled by the autoencoder's factor.

        None where there are none, or several cameras are tiled.

        Raises:
            ValueError: If the file cannot be read, or holds something else.
        """
        annotation = self._annotation(number)
        camera, *others = [camera for row in self.cameras for camera in row]
        if others or not _media(annotation, "latent_video"):
            return None
        length = len(self.vectors(number)["action"])
        try:
            path = self.root / _media_path(annotation, "latent_video", camera)
            return _read_latents(path, length) if path.is_file() else None
        except ValueError as error:
            raise ValueError(f"{str(self.files[number])!r}: {error}") from error

    def _annotation(self, number: int) -> dict[str, Any]:
        path = self.files[number]
        try:
            annotation = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
        if not isinstance(annotation, dict) or not _media(annotation, "video"):
            raise ValueError(f"{str(path)!r} names no video, neither in 'video_path' nor in 'videos'.")
        return annotation


def _media(annotation: dict[str, Any], kind: str) -> list[Any]:
    """Paths of the files `video` or `latent_video` of all cameras, as one string or a list of records."""
    if f"{kind}_path" in annotation:
        return [annotation[f"{kind}_path"]]
    return [record.get(f"{kind}_path") for record in annotation.get(f"{kind}s") or []]


def _media_files(content: bytes, cameras: Sequence[int]) -> list[str]:
    """Paths of the videos and latents of some cameras, found without parsing all the numbers of an annotation."""
    found: dict[bytes, list[bytes]] = {b"video": [], b"latent_video": []}
    for kind, path in MEDIA_ENTRY.findall(content):
        found[kind].append(path)
    with suppress(ValueError):  # a broken episode is named when its turn comes
        return [json.loads(paths[camera]) for paths in found.values() for camera in cameras if camera < len(paths)]
    return []


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # likewise
        return None


def _media_path(annotation: dict[str, Any], kind: str, camera: str) -> str:
    """The path of one camera."""
    paths = _media(annotation, kind)
    if int(camera) >= len(paths) or not isinstance(paths[int(camera)], str):
        raise ValueError(f"it names no {kind}_path of camera {camera}.")
    return paths[int(camera)]


def _read_latents(path: Path, length: int) -> torch.Tensor:
    """Latents of that many frames in a file of their own, by themselves or under `obs`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"cannot read latents from {str(path)!r}: {error}") from error
    latents = content.get("obs") if isinstance(content, dict) else content
    if not torch.is_tensor(latents) or latents.ndim != 4 or len(latents) != length:
        found = tuple(latents.shape) if torch.is_tensor(latents) else "no tensor"
        raise ValueError(f"{str(path)!r} must hold latents ({length}, C, h, w), alone or as 'obs', got {found}.")
    return latents.float()


def _vectors(annotation: dict[str, Any]) -> dict[str, np.ndarray]:
    """`action` and, where poses are recorded, `state` of an annotation."""
    if "actions" in annotation:
        between, vectors = _numbers(annotation, "actions"), {}
        last = np.zeros_like(between[:1])
    else:
        states = _states(annotation)
        between = derive_actions(states, "relative_euler")
        vectors = {"state": states.astype(np.float32)}
        last = np.concatenate([np.zeros((1, 6)), states[-1:, 6:]], axis=1)
    if between.ndim != 2 or not np.isfinite(between).all():
        raise ValueError(f"actions must be finite and (n, A), got {between.shape}.")
    return {"action": np.concatenate([between, last]).astype(np.float32)} | vectors


def _states(annotation: dict[str, Any]) -> np.ndarray:
    """Poses and gripper (T, 7) of either flavour."""
    if "states" in annotation:
        return _numbers(annotation, "states")
    if "state" in annotation and "continuous_gripper_state" in annotation:
        poses = _numbers(annotation, "state")
        gripper = _numbers(annotation, "continuous_gripper_state").reshape(-1, 1)
        if poses.ndim != 2 or len(poses) != len(gripper):
            raise ValueError(f"poses {poses.shape} do not go with {len(gripper)} gripper states.")
        return np.concatenate([poses[:, :6], gripper], axis=1)
    raise ValueError(
        f"it has neither 'actions', nor 'states', nor 'state' and 'continuous_gripper_state', but {sorted(annotation)}."
    )


def _numbers(annotation: dict[str, Any], key: str) -> np.ndarray:
    try:
        return np.asarray(annotation[key], dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key!r} must be numbers in rows of one length: {error}") from error
