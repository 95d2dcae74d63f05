"""The Drive page: the robot of a world model, driven with keys, buttons or a gamepad."""

import gradio as gr
from worlds import Worlds


def drive_page(worlds: Worlds) -> None:
    """Build the page, inside a tab."""
    gr.Markdown(", ".join(worlds))
