"""Videos beside each other that play in step, frame by frame where one wants to look closely."""

import math
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
from uploads import data_url

LOSSLESS_PIXELS = 2**21  # sheets up to that size lose nothing
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
    """The component; its value is what `videos` gives, or None, where it says `empty`."""
    return gr.HTML(
        html_template=f'<p class="empty">{empty}</p>{TEMPLATE}',
        css_template=(HERE / "viewer.css").read_text(),
        js_on_load=(HERE / "viewer.js").read_text(),
        apply_default_css=False,
        **kwargs,
    )


def videos(panels: dict[str, np.ndarray], fps: float, seen: int = 0) -> dict[str, Any]:
    """What the viewer shows.

    Args:
        panels: Videos (T, H, W, 3), uint8, by title; one of no frames has an empty place.
        fps: Frames a second.
        seen: Frames at the start that were given, not predicted.
    """
    return {
        "panels": [{"title": title} | _sheet(frames) for title, frames in panels.items()],
        "fps": fps,
        "seen": seen,
    }


def _sheet(frames: np.ndarray) -> dict[str, Any]:
    """All frames of a video in one picture, which carries no file name, and how to find them in it."""
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
    """A picture (H, W, 3), uint8, as a data URL."""
    lossless = pixels.shape[0] * pixels.shape[1] <= LOSSLESS_PIXELS
    return data_url(PIL.Image.fromarray(pixels), lossless=lossless, quality=50 if lossless else 92, method=1)
