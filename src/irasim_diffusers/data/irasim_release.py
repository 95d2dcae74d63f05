"""The data format of the IRASim release, in the flavours that it and its followers wrote.

A folder holds `annotation/<split>/<id>.json` beside mp4 files and, where they were computed, SDXL latents. What an
annotation holds tells its flavour: `actions` (Language-Table), `state` and `continuous_gripper_state` (RT-1, Bridge), or
`states` (DROID as cut by Ctrl-World). Reference: https://github.com/bytedance/IRASim.
"""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..actions import derive_actions
from .episode import Episode, InOrder, camera_layout, tile
from .video import read_video


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
            raise ValueError(f"`split` must be one of {splits} in {str(self.root)!r}, got {self.split!r}.")
        known = [str(number) for number in range(len(_videos(self._first)))]
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
        for number in range(len(self.files)):
            with suppress(ValueError):
                return self._annotation(number)
        raise ValueError(f"no annotation in {self.name!r} can be read.")

    @property
    def action_derivation(self) -> str:
        """`"relative_euler"` where poses are recorded, else `"recorded"`."""
        return "recorded" if "actions" in self._first else "relative_euler"

    @property
    def identity(self) -> dict[str, Any]:
        """Folder, cameras, and names and sizes of the annotations."""
        return {
            "root": str(self.root.resolve()),
            "cameras": self.cameras,
            "files": [(path.name, path.stat().st_size) for path in self.files],
        }

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.files)

    def __getitem__(self, number: int) -> Episode:
        """One episode.

        Raises:
            ValueError: If a file is missing or unreadable, or frames and actions disagree.
        """
        annotation = self._annotation(number)
        vectors = self.vectors(number)
        videos = _videos(annotation)
        try:
            views = {camera: read_video(self.root / videos[int(camera)]) for row in self.cameras for camera in row}
            frames = tile(self.cameras, views)
            if len(frames) != len(vectors["action"]):
                raise ValueError(
                    f"{len(frames)} frames want {len(frames) - 1} actions between them, got "
                    f"{len(vectors['action']) - 1}."
                )
        except (ValueError, IndexError) as error:
            raise ValueError(f"{str(self.files[number])!r}: {error}") from error
        texts = annotation.get("texts") or [annotation.get("language_instruction") or ""]
        return Episode(frames, vectors.pop("action"), vectors, texts[0])

    def vectors(self, number: int) -> dict[str, np.ndarray]:
        """`action` (T, A) and, where poses are recorded, `state` (T, 7) of one episode, float32."""
        annotation = self._annotation(number)
        path = self.files[number]
        if "actions" in annotation:
            between, vectors = np.asarray(annotation["actions"], dtype=np.float64), {}
            last = np.zeros_like(between[:1])
        else:
            states = _states(annotation, path)
            try:
                between = derive_actions(states, "relative_euler")
            except ValueError as error:
                raise ValueError(f"{str(path)!r}: {error}") from error
            vectors = {"state": states.astype(np.float32)}
            last = np.concatenate([np.zeros((1, 6)), states[-1:, 6:]], axis=1)
        if between.ndim != 2 or not np.isfinite(between).all():
            raise ValueError(f"{str(path)!r}: actions must be finite and (n, A), got {between.shape}.")
        return {"action": np.concatenate([between, last]).astype(np.float32)} | vectors

    def component_names(self, key: str) -> list[str] | None:
        """Planar x and y; or position, Euler angles and gripper of the rest."""
        names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
        if key == "action" and "actions" in self._first:
            return names[:2] if len(self._first["actions"][0]) == 2 else None
        width = len(self._first["states"][0]) if "states" in self._first else len(names)
        return names if width == len(names) else None

    def latents(self, number: int) -> torch.Tensor | None:
        """Latents (T, C, h, w) of one episode that lie beside its video, scaled by the autoencoder's factor, or None.

        Raises:
            ValueError: If the file cannot be read, or several cameras are tiled.
        """
        annotation = self._annotation(number)
        paths = [annotation["latent_video_path"]] if "latent_video_path" in annotation else []
        paths = paths or [latent["latent_video_path"] for latent in annotation.get("latent_videos", [])]
        if not paths or sum(len(row) for row in self.cameras) != 1:
            return None
        path = self.root / paths[int(self.cameras[0][0])]
        if not path.is_file():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"cannot read latents from {os.fspath(path)!r}: {error}") from error
        latents = content["obs"] if isinstance(content, dict) else content
        if len(latents) != len(self.vectors(number)["action"]):
            raise ValueError(f"{os.fspath(path)!r} holds {len(latents)} frames, unlike the actions beside it.")
        return latents.float()

    def _annotation(self, number: int) -> dict[str, Any]:
        path = self.files[number]
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r} is no JSON: {error}") from error


def _videos(annotation: dict[str, Any]) -> list[str]:
    """Paths of the videos of all cameras, as one string or a list of records."""
    if "video_path" in annotation:
        return [annotation["video_path"]]
    return [video["video_path"] for video in annotation.get("videos", [])]


def _states(annotation: dict[str, Any], path: Path) -> np.ndarray:
    """Poses and gripper (T, 7) of either flavour."""
    if "states" in annotation:
        return np.asarray(annotation["states"], dtype=np.float64)
    if "state" in annotation and "continuous_gripper_state" in annotation:
        poses = np.asarray(annotation["state"], dtype=np.float64)
        gripper = np.asarray(annotation["continuous_gripper_state"], dtype=np.float64).reshape(-1, 1)
        if poses.ndim != 2 or len(poses) != len(gripper):
            raise ValueError(f"{str(path)!r}: poses {poses.shape} do not go with {len(gripper)} gripper states.")
        return np.concatenate([poses[:, :6], gripper], axis=1)
    raise ValueError(
        f"{str(path)!r} has neither 'actions', nor 'states', nor 'state' and 'continuous_gripper_state'; it has "
        f"{sorted(annotation)}."
    )
