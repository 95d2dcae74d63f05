"""Start, actions and ground truth of a prediction on the Trajectory page."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from drawing import can_draw, canvas, path_actions, read_path, resample
from visitor_files import MAX_ACTIONS, read_action_file, read_clip
from worlds import World

DRAWN, RECORDED, FILE = "Drawn path", "Recorded", "From a file"
NUM_EXAMPLES = 6
LONGEST_DRAWING = 60  # frames


@dataclass(frozen=True)
class Scene:
    """A start and, if known, the recording that follows it."""

    history: np.ndarray  # (h, H, W, 3), uint8
    truth: np.ndarray  # (T, H, W, 3), uint8: the following frames; empty if unknown
    recorded: np.ndarray | None = None  # (n, A): the actions that led to `truth`; only for examples


def examples(world: World) -> list[Scene]:
    """Select evenly spaced scenes of a model's example clip, each followed by recorded actions.

    The list is empty if the model has no example clip with actions.
    """
    if world.clip is None or world.clip_actions is None:
        return []
    length = world.pipeline.transformer.config.num_history_frames
    first = max(length, world.clip_history)
    last = max(first, len(world.clip) - 12)
    ends = np.unique(np.linspace(first, last, NUM_EXAMPLES).round().astype(int))
    return [
        Scene(world.clip[end - length : end], world.clip[end:], world.clip_actions[end - world.clip_history :])
        for end in ends
    ]


def upload_scene(path: str, world: World) -> Scene:
    """Create a scene from an uploaded image or video.

    The later frames of a video are the ground truth of uploaded actions.

    Raises:
        ValueError: If the file cannot be used.
    """
    config = world.pipeline.transformer.config
    frames = read_clip(path, world.pipeline.frame_size, config.num_history_frames + MAX_ACTIONS)
    if config.conditioning == "video" and len(frames) < config.num_history_frames:
        raise ValueError(
            f"This model needs at least {config.num_history_frames} frames, got {len(frames)}: upload a longer video."
        )
    return Scene(frames[: config.num_history_frames], frames[config.num_history_frames :])


def action_kinds(world: World, scene: Scene | None) -> list[str]:
    """List the possible sources of the actions, the default first."""
    kinds = {
        RECORDED: scene is not None and scene.recorded is not None,  # the default, because it needs one click only
        DRAWN: can_draw(world.pipeline.action_space) is None,
        FILE: True,
    }
    return [kind for kind, possible in kinds.items() if possible]


def choose_actions(
    kind: str, scene: Scene, world: World, drawn: Any, file: str | None, length: int, scale: float
) -> np.ndarray:
    """Return the selected actions (n, A), raw units.

    Raises:
        ValueError: If actions are missing or invalid.
    """
    if kind == FILE:
        if not file:
            raise ValueError("Upload a file of actions first.")
        return read_action_file(file, len(world.pipeline.action_space))
    if not 1 <= length <= LONGEST_DRAWING:
        raise ValueError(f"The length must be 1 to {LONGEST_DRAWING} frames, got {length}.")
    if kind == RECORDED:
        if scene.recorded is None:
            raise ValueError("Nothing is recorded after an uploaded start: draw a path, or upload a file of actions.")
        return scene.recorded[:length]
    return path_actions(resample(read_path(drawn), length), world.pipeline.action_space, scale)


def known_truth(kind: str, scene: Scene) -> np.ndarray:
    """Return the ground truth if it belongs to the actions.

    It belongs to the recorded actions of an example, or to a file of actions with an uploaded video.
    """
    known = kind == (FILE if scene.recorded is None else RECORDED)
    return scene.truth if known else scene.truth[:0]


def start_canvas(scene: Scene | None, world: World, scenes: list[Scene], chosen: int | None = None) -> dict[str, Any]:
    """Return the drawing's value: the last history frame, and the examples to select from."""
    starts = [each.history[-1] for each in scenes]
    if scene is None:
        blank = np.full((*world.pipeline.frame_size, 3), 128, dtype=np.uint8)
        return canvas(blank, "Upload an image or video to start from.", False, starts, None)
    drawable = can_draw(world.pipeline.action_space) is None
    hint = "Draw a path here. The robot follows it." if drawable else ""
    return canvas(scene.history[-1], hint, drawable, starts, chosen)


def default_scale(world: World) -> float:
    """Return the default width of the image in units of a relative action space.

    With it, a typical motion crosses the image in 20 frames.
    """
    return float(f"{20 / max(np.abs(world.pipeline.action_space.scale)):.2g}")
