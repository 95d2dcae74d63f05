"""The Drive page: drive the robot with keys, buttons, a gamepad or the pointer."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
from endpoints import describe_space
from uploads import data_url
from worlds import Start, World, Worlds

FOLDER = Path(__file__).parent


def drive_page(worlds: Worlds) -> None:
    """Build the page, inside a tab."""
    for name, reason in worlds.failures.items():
        gr.HTML(f"<p class='failure'>{html.escape(name)} cannot be loaded: {html.escape(reason)}</p>")
    if not worlds:
        return
    gr.HTML(
        json.dumps({name: _for_page(world) for name, world in worlds.items()}),
        html_template=(FOLDER / "drive.html").read_text(encoding="utf-8"),
        css_template=(FOLDER / "drive.css").read_text(encoding="utf-8"),
        js_on_load=(FOLDER / "drive.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="drive",
    )


def _for_page(world: World) -> dict[str, Any]:
    return {
        "space": describe_space(world.pipeline.transformer.config),
        "starts": {name: _start_for_page(start) for name, start in world.starts.items()},
    }


def _start_for_page(start: Start) -> dict[str, Any]:
    demo = [] if start.demo is None else np.round(start.demo, 3).tolist()
    return {"picture": data_url(PIL.Image.fromarray(start.frames[-1])), "demo": demo}
