"""A path drawn on a picture, and the actions it means."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from viewer import picture_url

MAX_POINTS = 20_000
HERE = Path(__file__).parent
TEMPLATE = """
<div class="stage">
  <img alt="Start frame" draggable="false">
  <svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">
    <path class="halo"></path><path class="line"></path>
  </svg>
  <span class="tip" hidden></span>
  <p class="hint"></p>
</div>
<div class="starts" role="group" aria-label="Start frame"></div>
"""


def drawing(value: dict[str, Any] | None, **kwargs: Any) -> gr.HTML:
    """A picture to draw one path on; its event `drawn` comes when the pen is lifted, `picked` with the `index` of a start below it.

    Its value is what `canvas` gives, with the path drawn as `path`.
    """
    return gr.HTML(
        value=value,
        html_template=TEMPLATE,
        css_template=(HERE / "drawing.css").read_text(),
        js_on_load=(HERE / "drawing.js").read_text(),
        apply_default_css=False,
        **kwargs,
    )


def canvas(
    picture: np.ndarray, hint: str, enabled: bool, starts: list[np.ndarray], chosen: int | None
) -> dict[str, Any]:
    """An empty canvas.

    Args:
        picture: What to draw on (H, W, 3), uint8.
        hint: Stands on it until something is drawn.
        enabled: Whether anything can be drawn.
        starts: Pictures to choose from, below.
        chosen: Which of them is on the canvas.
    """
    return {
        "image": picture_url(picture),
        "small": picture.shape[1] < 256,
        "hint": hint,
        "enabled": enabled,
        "starts": [picture_url(start) for start in starts],
        "chosen": chosen,
        "path": [],
    }


def read_path(value: Any) -> np.ndarray:
    """The path that a browser sends.

    Args:
        value: The drawing's value.

    Returns:
        Points (n, 3), float64: x and y as shares of the picture's width and height, time in milliseconds.

    Raises:
        ValueError: If nothing is drawn, or if that is no path: it comes from outside.
    """
    path = value.get("path") if isinstance(value, dict) else None
    if not path:
        raise ValueError("nothing is drawn yet: draw a path on the picture.")
    if not isinstance(path, list) or len(path) > MAX_POINTS:
        raise ValueError(f"the path must be a list of at most {MAX_POINTS} points.")
    try:
        points = np.asarray(path, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError("the path must be a list of (x, y, time), all numbers.") from error
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise ValueError(f"the path must be a list of (x, y, time), all finite, got shape {points.shape}.")
    if points[:, :2].min() < 0 or points[:, :2].max() > 1:
        raise ValueError("the path must lie on the picture: x and y in [0, 1].")
    points[:, 2] = np.maximum.accumulate(points[:, 2])  # a browser's clock may be coarse
    return points


def resample(points: np.ndarray, count: int) -> np.ndarray:
    """Places at equal steps of time along a path; the last one is its end.

    Args:
        points: Points (n, 3): x, y, and time, which does not decrease. Without any duration each point takes equally long.
        count: How many places.

    Returns:
        Places (count + 1, 2); the first is where the path begins.
    """
    times = points[:, 2] if np.ptp(points[:, 2]) > 0 else np.arange(len(points))
    wanted = np.linspace(times[0], times[-1], count + 1)
    return np.stack([np.interp(wanted, times, points[:, axis]) for axis in (0, 1)], axis=1)


def can_draw(config: Any) -> str | None:
    """Why no path can be drawn for the action space of a model's config; None if one can."""
    if config.action_dim != 2:
        return f"its actions have {config.action_dim} components, and a drawing two"
    if config.action_space == "absolute" and (config.get("action_low") is None or config.get("action_high") is None):
        return "its config does not record the bounds of its targets (`action_low`, `action_high`)"
    return None


def path_actions(places: np.ndarray, config: Any, scale: float = 1.0) -> np.ndarray:
    """The actions that follow a path.

    In an absolute space they are targets: the picture's left and upper edge mean `action_low`, the right and lower one
    `action_high`. In a relative one they are motions: those along the path, where the picture is `scale` units wide and high.

    Args:
        places: Places (n + 1, 2), shares of width and height.
        config: The model's config.
        scale: Units of the action space across the picture, of relative spaces.

    Returns:
        Actions (n, 2), float64.

    Raises:
        ValueError: If a path cannot be drawn for this action space.
    """
    reason = can_draw(config)
    if reason is not None:
        raise ValueError(f"a path cannot be drawn for this model: {reason}; give the actions in a file.")
    if config.action_space == "relative":
        return np.diff(places, axis=0) * scale
    low, high = (np.broadcast_to(np.float64(config[name]), 2) for name in ("action_low", "action_high"))
    return low + places[1:] * (high - low)
