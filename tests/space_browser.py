"""Fixtures: the Space in a separate process, and a browser."""

import contextlib
import os
import shutil
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from fork_server import fork_server

BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def app_url(tmp_path_factory):
    """URL of the Space with the embedded model, for all tests of the run."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("space")
    variables = {
        "GRADIO_TEMP_DIR": str(folder / "files"),
        "TMPDIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "FORWARDED_ALLOW_IPS": "127.0.0.2",
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [Path(__file__).parents[1] / "spaces" / "app.py", "--port", port, "--visitor-sessions", "32"]
    process = fork_server().start(*command, variables=variables)
    url = f"http://127.0.0.1:{port}/"
    while process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            break
        time.sleep(0.2)
    assert process.poll() is None, process.stderr
    yield url
    os.kill(process.pid, signal.SIGTERM)
    process.wait(20)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, one per module because playwright's event loop runs while the browser is open."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A new page with separate storage; the test fails if a script of the page throws."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []
