"""The Space: drive the robot of a world model in a browser.

python spaces/app.py
python spaces/app.py --model push-t org/model runs/mine --port 7861
"""

import argparse
import ipaddress
import math
import os
import socket
import sys
from typing import Any

from irasim_diffusers.version import INSTALL

try:
    import gradio as gr
except ModuleNotFoundError as error:
    sys.stderr.write(f"app.py: error: {error.name} is missing: {INSTALL.format('space')}.\n")
    raise SystemExit(2) from None
from body_limit import BodyLimit
from drive import drive_page
from endpoints import add_endpoints
from preference import preference_page
from sessions import Sessions
from starlette.middleware import Middleware
from study_videos import find_demonstration, open_study, owner_key
from trajectory import trajectory_page
from worlds import EMBEDDED, Worlds

PAGES = {"Drive": drive_page, "Trajectory": trajectory_page}
HEADER = """<header class="header"><h1>Drive the robot of a world model</h1>
<p>There is no simulator: the model predicts every frame after the first from your actions.</p></header>"""
CSS = """
.header h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
.header p { margin: 0.2rem 0 0; color: var(--body-text-color-subdued); }
.failure { padding: 0.6rem 0.9rem; border: 1px solid #dc2626; border-radius: 0.6rem; background: rgb(220 38 38 / 0.1); }
#preference { max-width: 680px; margin: 0 auto; }
"""
THEME = gr.themes.Default(primary_hue="blue", neutral_hue="slate").set(
    # the default colors have a contrast ratio below 4.5, the minimum of WCAG AA
    body_text_color_subdued="*neutral_600",
    block_info_text_color="*neutral_600",
    input_placeholder_color="*neutral_500",
    color_accent="*primary_600",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_hover_dark="*primary_700",
)
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css": CSS,
    "max_file_size": "10mb",
    "ssr_mode": False,
    "footer_links": ["api"],
    "run_history": False,
    "state_session_capacity": 100,  # visitors with stored uploads: the history and up to 240 frames each
}


def build_app(worlds: Worlds, sessions: Sessions, study: tuple[Any, ...] | None = None) -> gr.Blocks:
    """Build all pages and endpoints for the loaded models; without `study`, there is no Preference page."""
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


SHORTEST_PREFIX = 8
"""Minimum prefix length, in bits, of a network of proxies."""


def trust_proxy() -> None:
    """Trust `X-Forwarded-For` only from the addresses in FORWARDED_ALLOW_IPS; none by default.

    Raises:
        ValueError: If an entry is not an address or a network, such as `*`, or is a network so large that visitors may be in it
            and could choose their address.
    """
    trusted = os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # uvicorn's default trusts every local process
    for entry in filter(None, map(str.strip, trusted.split(","))):
        try:
            prefix = ipaddress.ip_network(entry).prefixlen
        except ValueError:
            prefix = 0
        if prefix < SHORTEST_PREFIX:
            raise ValueError(
                f"FORWARDED_ALLOW_IPS must be addresses, or networks with prefixes of at least {SHORTEST_PREFIX} bits, of proxies, "
                f"such as 192.0.2.7 or 10.1.0.0/16, separated by commas, got {entry!r}."
            )


def main() -> None:
    """Load the models and serve them; report an invalid setting in one line, with exit status 2."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        check_port(arguments.port)
        trust_proxy()
        study = open_study(arguments.study) if arguments.study else None
        sessions = Sessions(idle_seconds=arguments.idle_seconds, most_each=arguments.visitor_sessions)
        worlds = Worlds(arguments.model)
        if not worlds:
            raise ValueError(f"no model could be loaded: {'; '.join(worlds.failures.values())}")
        for name, reason in worlds.failures.items():
            sys.stderr.write(f"{parser.prog}: warning: the model {name!r} could not be loaded: {reason}\n")
        study = study or find_demonstration(worlds)
        app = build_app(worlds, sessions, study and (*study, owner_key(arguments.study)))
        app.launch(server_port=arguments.port, app_kwargs={"middleware": [Middleware(BodyLimit)]}, **LAUNCH)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def check_port(port: int | None) -> None:
    """Check that a server can listen on a port; None stands for the first free port.

    Raises:
        ValueError: If the port is not in [1, 65535], is in use, or is reserved for privileged users.
    """
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise ValueError(f"`--port` must be in [1, 65535], got {port}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"`--port` must be free, got {port}: {error.strerror}; choose another one, or omit the flag."
            ) from error


def _parser() -> argparse.ArgumentParser:
    models = os.environ.get("IRASIM_MODELS", EMBEDDED).replace(",", " ").split()
    parser = argparse.ArgumentParser(description="The Space: drive the robot of a world model in a browser.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=models,
        help=f"pipeline folders, Hub ids, or {EMBEDDED} for the embedded model (default: the environment variable IRASIM_MODELS, "
        f"or {EMBEDDED})",
    )
    parser.add_argument("--port", type=int, help="port (default: the first free port, starting at 7860)")
    parser.add_argument(
        "--idle-seconds",
        type=_positive(float),
        default=120.0,
        help="delete a session after this many seconds without requests (default: %(default)s)",
    )
    parser.add_argument(
        "--visitor-sessions",
        type=_positive(int),
        default=os.environ.get("IRASIM_VISITOR_SESSIONS", "16"),
        help="maximum number of concurrent sessions per address (default: the environment variable IRASIM_VISITOR_SESSIONS, or 16)",
    )
    parser.add_argument(
        "--study",
        default=os.environ.get("IRASIM_STUDY"),
        help="folder of a preference study (default: the environment variable IRASIM_STUDY, or a demonstration)",
    )
    return parser


def _positive(kind: type) -> Any:
    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse shows this name in messages
    return number


if __name__ == "__main__":
    main()
