"""The Space: drive the robot of a world model in a browser.

python spaces/app.py
python spaces/app.py --model push-t org/model runs/mine --port 7861
"""

import argparse
import os
from typing import Any

import gradio as gr
from drive import drive_page
from preference import preference_page
from study_videos import find_study
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


def build_app(worlds: Worlds, study: Any = None) -> gr.Blocks:
    """All pages over these models."""
    with gr.Blocks(title="Drive a robot's world model", delete_cache=(600, 3600)) as app:
        for name, page in PAGES.items():
            with gr.Tab(name, elem_id=f"tab-{name.lower()}"):
                page(worlds)
        if study is not None:
            with gr.Tab("Preference", elem_id="tab-preference"):
                preference_page(*study)
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
    parser.add_argument(
        "--study",
        default=os.environ.get("IRASIM_STUDY"),
        help="folder of a preference study (default: a demonstration)",
    )
    arguments = parser.parse_args()
    worlds = Worlds(arguments.model)
    app = build_app(worlds, find_study(arguments.study, worlds))
    app.launch(server_port=arguments.port, **LAUNCH)


if __name__ == "__main__":
    main()
