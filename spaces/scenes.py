"""Where a prediction starts, the actions it is asked for, and the truth where it is known."""

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
    """Where a prediction starts, and what is known of how it went on."""

    history: np.ndarray  # (h, H, W, 3), uint8
    truth: np.ndarray  # (T, H, W, 3), uint8: what followed; empty where nothing is known
    recorded: np.ndarray | None = None  # (n, A): the actions that led to the truth, of examples


def examples(world: World) -> list[Scene]:
    """Scenes spread over a model's example clip, each with a part of it to come."""
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
    """A scene from an uploaded picture, or from a video whose later frames are the truth of the actions to come.

    Raises:
        ValueError: If the file cannot be used.
    """
    config = world.pipeline.transformer.config
    frames = read_clip(path, world.pipeline.frame_size, config.num_history_frames + MAX_ACTIONS)
    if config.conditioning == "video" and len(frames) < config.num_history_frames:
        raise ValueError(f"This model starts from {config.num_history_frames} frames: give a video.")
    return Scene(frames[: config.num_history_frames], frames[config.num_history_frames :])


def action_kinds(world: World, scene: Scene | None) -> list[str]:
    """Where the actions may come from, what suits best first."""
    kinds = {
        RECORDED: scene is not None
        and scene.recorded is not None,  # one click is enough; a drawn path takes its place
        DRAWN: can_draw(world.pipeline.transformer.config) is None,
        FILE: True,
    }
    return [kind for kind, possible in kinds.items() if possible]


def choose_actions(
    kind: str, scene: Scene, world: World, drawn: Any, file: str | None, length: int, scale: float
) -> np.ndarray:
    """The actions (n, A) that the page asks for.

    Raises:
        ValueError: If there are none, or they cannot be used.
    """
    config = world.pipeline.transformer.config
    if kind == FILE:
        if not file:
            raise ValueError("Give a file of actions first.")
        return read_action_file(file, config.action_dim)
    if not 1 <= length <= LONGEST_DRAWING:
        raise ValueError(f"The length must be 1 to {LONGEST_DRAWING} frames, got {length}.")
    if kind == RECORDED:
        if scene.recorded is None:
            raise ValueError("Nothing is recorded after an uploaded start: draw a path, or give a file of actions.")
        return scene.recorded[:length]
    return path_actions(resample(read_path(drawn), length), config, scale)


def known_truth(kind: str, scene: Scene) -> np.ndarray:
    """What truly followed: of recorded actions from an example, of a file's from an uploaded video."""
    known = kind == (FILE if scene.recorded is None else RECORDED)
    return scene.truth if known else scene.truth[:0]


def start_canvas(scene: Scene | None, world: World, scenes: list[Scene], chosen: int | None = None) -> dict[str, Any]:
    """The canvas over the last frame seen, and the examples to choose from."""
    starts = [each.history[-1] for each in scenes]
    if scene is None:
        blank = np.full((*world.pipeline.frame_size, 3), 128, dtype=np.uint8)
        return canvas(blank, "Give a picture or video to start from.", False, starts, None)
    drawable = can_draw(world.pipeline.transformer.config) is None
    hint = "Draw a path here: the robot follows it" if drawable else ""
    return canvas(scene.history[-1], hint, drawable, starts, chosen)


def default_scale(world: World) -> float:
    """Units of a relative action space across the picture at which a path over its width in 20 frames is a usual motion."""
    scale = np.broadcast_to(np.float64(world.pipeline.transformer.config.action_scale), 2)
    return float(f"{20 / scale.max():.2g}")
