"""The Space: drive the robot of a world model in a browser.

python spaces/app.py
python spaces/app.py --model push-t org/model runs/mine --port 7861
"""

import argparse
import os
from typing import Any

import gradio as gr
from drive import drive_page
from endpoints import add_endpoints
from preference import preference_page
from sessions import Sessions
from study_videos import find_study, owner_key
from trajectory import trajectory_page
from worlds import EMBEDDED, Worlds

PAGES = {"Drive": drive_page, "Trajectory": trajectory_page}
HEADER = """<header class="header"><h1>Drive the robot of a world model</h1>
<p>Nothing here is simulated: every frame after the first is predicted from your actions.</p></header>"""
CSS = """
.header h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
.header p { margin: 0.2rem 0 0; color: var(--body-text-color-subdued); }
.failure { padding: 0.6rem 0.9rem; border: 1px solid #dc2626; border-radius: 0.6rem; background: rgb(220 38 38 / 0.1); }
#preference { max-width: 680px; margin: 0 auto; }
"""
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(primary_hue="blue", neutral_hue="slate"),
    "css": CSS,
    "max_file_size": "10mb",
    "ssr_mode": False,
    "footer_links": ["api"],
    "run_history": False,
    "state_session_capacity": 100,  # visitors whose uploads are kept: up to 252 frames each
}


def build_app(worlds: Worlds, sessions: Sessions, study: tuple[Any, ...] | None = None) -> gr.Blocks:
    """All pages over these models, and the endpoints."""
    with gr.Blocks(title="Drive a robot's world model", delete_cache=(300, 1800)) as app:
        gr.HTML(HEADER)
        add_endpoints(worlds, sessions)
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
        "--idle-seconds",
        type=float,
        default=120.0,
        help="a session nobody uses for so long ends (default: %(default)s)",
    )
    parser.add_argument(
        "--visitor-sessions",
        type=int,
        default=16,
        help="sessions at a time from one address (default: %(default)s)",
    )
    parser.add_argument(
        "--study",
        default=os.environ.get("IRASIM_STUDY"),
        help="folder of a preference study (default: the environment's IRASIM_STUDY, or a demonstration)",
    )
    arguments = parser.parse_args()
    worlds = Worlds(arguments.model)
    study = find_study(arguments.study, worlds)
    sessions = Sessions(idle_seconds=arguments.idle_seconds, most_each=arguments.visitor_sessions)
    app = build_app(worlds, sessions, study and (*study, owner_key(arguments.study)))
    app.launch(server_port=arguments.port, **LAUNCH)


if __name__ == "__main__":
    main()
