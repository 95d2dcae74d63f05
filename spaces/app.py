"""The Space: drive the robot of a world model in a browser.

python spaces/app.py
python spaces/app.py --model push-t org/model runs/mine --port 7861
"""

import argparse
import os

import gradio as gr
from drive import drive_page
from trajectory import trajectory_page
from worlds import EMBEDDED, Worlds

PAGES = {"Drive": drive_page, "Trajectory": trajectory_page}
LAUNCH = {
    "max_file_size": "10mb",
    "ssr_mode": False,
    "footer_links": ["api"],
    "run_history": False,
    "state_session_capacity": 1000,
}


def build_app(worlds: Worlds) -> gr.Blocks:
    """All pages over these models."""
    with gr.Blocks(title="Drive a robot's world model", delete_cache=(600, 3600)) as app:
        for name, page in PAGES.items():
            with gr.Tab(name, elem_id=f"tab-{name.lower()}"):
                page(worlds)
    return app


def main() -> None:
    """Load the models and serve them."""
    models = os.environ.get("IRASIM_MODELS", EMBEDDED).replace(",", " ").split()
    parser = argparse.ArgumentParser(description="The Space: drive the robot of a world model in a browser.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=models,
        help=f"pipeline folders or Hub ids (default: the environment's IRASIM_MODELS, or {EMBEDDED})",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    arguments = parser.parse_args()
    app = build_app(Worlds(arguments.model))
    app.launch(server_port=arguments.port, **LAUNCH)


if __name__ == "__main__":
    main()
