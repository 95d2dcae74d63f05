"""A viewer of several synchronized videos, with a slider to step through the frames."""

import math
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
from uploads import data_url

LOSSLESS_PIXELS = 2**21  # larger sheets use lossy compression
HERE = Path(__file__).parent
TEMPLATE = """
<div class="panels" aria-live="off"></div>
<div class="controls" hidden>
  <button class="play" type="button" aria-label="Play or pause"></button>
  <input class="frame" type="range" min="0" value="0" aria-label="Frame">
  <output class="time"></output>
</div>
"""


def viewer(empty: str, **kwargs: Any) -> gr.HTML:
    """Create a viewer component.

    Args:
        empty: Text shown while the value is None.
        kwargs: Passed to `gr.HTML`; `videos` creates the `value`.
    """
    return gr.HTML(
        html_template=f'<p class="empty">{empty}</p>{TEMPLATE}',
        css_template=(HERE / "viewer.css").read_text(encoding="utf-8"),
        js_on_load=(HERE / "viewer.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        **kwargs,
    )


def videos(panels: dict[str, np.ndarray], fps: float, seen: int = 0) -> dict[str, Any]:
    """Create the value of a `viewer` component.

    Args:
        panels: Videos (T, H, W, 3), uint8, by title; a video may have no frames.
        fps: Frames per second.
        seen: Number of history frames at the start, which were not predicted.
    """
    return {
        "panels": [{"title": title} | _sheet(frames) for title, frames in panels.items()],
        "fps": fps,
        "seen": seen,
    }


def _sheet(frames: np.ndarray) -> dict[str, Any]:
    """Arrange all frames of a video in one image; return its layout and data URL.

    Unlike a file name, a data URL does not reveal the model to raters.
    """
    count, height, width, _ = frames.shape
    if count == 0:
        return {"count": 0, "width": width, "height": height}
    columns = math.ceil(math.sqrt(count * height / width))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    sheet[:count] = frames
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return {"count": count, "width": width, "height": height, "columns": columns, "sheet": picture_url(sheet)}


def picture_url(pixels: np.ndarray) -> str:
    """Encode an image (H, W, 3), uint8, as a data URL."""
    lossless = pixels.shape[0] * pixels.shape[1] <= LOSSLESS_PIXELS
    return data_url(PIL.Image.fromarray(pixels), lossless=lossless, quality=50 if lossless else 92, method=1)
