"""A path drawn on an image, and its conversion to actions."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from viewer import picture_url

from irasim_diffusers import ActionSpace

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
    """Create a component on which the visitor draws one path.

    It sends the event `drawn` with the `path` when the pen is lifted, and the event `picked` with the `index` of a start image
    when the visitor selects one.

    Args:
        value: A value from `canvas`.
        kwargs: Passed to `gr.HTML`.
    """
    return gr.HTML(
        value=value,
        html_template=TEMPLATE,
        css_template=(HERE / "drawing.css").read_text(encoding="utf-8"),
        js_on_load=(HERE / "drawing.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        **kwargs,
    )


def canvas(
    picture: np.ndarray, hint: str, enabled: bool, starts: list[np.ndarray], chosen: int | None
) -> dict[str, Any]:
    """Create the value of an empty drawing.

    Args:
        picture: Background image (H, W, 3), uint8.
        hint: Text shown until the visitor draws.
        enabled: Whether the visitor can draw.
        starts: Start images to select from, shown below the drawing.
        chosen: Index in `starts` of the image that `picture` shows; None for another image.
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


def read_path(path: Any) -> np.ndarray:
    """Check a path from a browser.

    Args:
        path: The `path` of the event `drawn`.

    Returns:
        Points (n, 3), float64: x and y as fractions of the image width and height, time in milliseconds.

    Raises:
        ValueError: If nothing was drawn, or if the value is not a path.
    """
    if not path:
        raise ValueError("nothing is drawn yet: draw a path on the image.")
    if not isinstance(path, list) or len(path) > MAX_POINTS:
        raise ValueError(f"the path must be a list of at most {MAX_POINTS} points.")
    try:
        points = np.asarray(path, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError("the path must be a list of (x, y, time), all numbers.") from error
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise ValueError(f"the path must be a list of (x, y, time), all finite, got shape {points.shape}.")
    if points[:, :2].min() < 0 or points[:, :2].max() > 1:
        raise ValueError("the path must be inside the image: x and y in [0, 1].")
    points[:, 2] = np.maximum.accumulate(points[:, 2])  # the browser's clock may have a low resolution
    return points


def resample(points: np.ndarray, count: int) -> np.ndarray:
    """Resample a path at equal time steps.

    Args:
        points: Points (n, 3): x, y, and non-decreasing time. If all times are equal, each segment takes the same time.
        count: Number of steps.

    Returns:
        Positions (count + 1, 2), from the first to the last point of the path.
    """
    times = points[:, 2] if np.ptp(points[:, 2]) > 0 else np.arange(len(points))
    wanted = np.linspace(times[0], times[-1], count + 1)
    return np.stack([np.interp(wanted, times, points[:, axis]) for axis in (0, 1)], axis=1)


def can_draw(space: ActionSpace) -> str | None:
    """Return why a path cannot be drawn for an action space; None if it can."""
    if len(space) != 2:
        return f"its actions have {len(space)} components, but a drawing has two"
    if space.kind == "absolute" and not np.isfinite([space.low, space.high]).all():
        return "its config does not record the bounds of its targets (`action_low`, `action_high`)"
    return None


def path_actions(places: np.ndarray, space: ActionSpace, scale: float = 1.0) -> np.ndarray:
    """Convert a path to actions.

    In an absolute space they are targets: the left and upper edges of the image correspond to `action_low`, the right and lower
    edges to `action_high`. In a relative space they are the motions along the path.

    Args:
        places: Positions (n + 1, 2), fractions of width and height.
        space: The model's action space.
        scale: Width and height of the image in units of the action space, for relative spaces.

    Returns:
        Actions (n, 2), float64.

    Raises:
        ValueError: If a path cannot be drawn for this action space.
    """
    reason = can_draw(space)
    if reason is not None:
        raise ValueError(f"a path cannot be drawn for this model: {reason}; give the actions in a file.")
    if space.kind == "relative":
        return np.diff(places, axis=0) * scale
    low, high = np.array(space.low), np.array(space.high)
    return low + places[1:] * (high - low)
