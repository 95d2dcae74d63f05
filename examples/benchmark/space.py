"""Measure the Space: latency and frame rate in a browser, concurrent users, server memory.

    pip install ".[space]" playwright  # also requires Debian's chromium
    python examples/benchmark/space.py --users 10 --seconds 300

The script starts the Space, drives in headless Chromium, and then runs `--users` concurrent gradio_client sessions.
Each user sends the next request when the previous one is answered, but not faster than the frame rate of the model.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers import HfArgumentParser

from irasim_diffusers.commands import check_output
from irasim_diffusers.files import temporary_path, write_text
from irasim_diffusers.training import exit_without_extra, run_script

try:
    from gradio_client import Client
except ModuleNotFoundError as error:
    exit_without_extra(error, "space")

SPACE = Path(__file__).parents[2] / "spaces" / "app.py"
KEYS = ("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp")


@dataclass
class SpaceArguments:
    model: str = field(default="push-t", metadata={"help": "name of the model; see app.py"})
    presses: int = field(default=20, metadata={"help": "number of key presses in the browser; 0 skips the browser"})
    users: int = field(default=10, metadata={"help": "number of concurrent gradio_client users, at most 32"})
    seconds: float = field(default=60.0, metadata={"help": "duration of the test with concurrent users in seconds"})
    chunk_length: int = field(default=4, metadata={"help": "frames per request of a user, at most 16"})
    output: Path | None = field(default=None, metadata={"help": "JSON report to write"})
    screenshot: Path | None = field(
        default=None, metadata={"help": "PNG file to write a screenshot of the page to, unless --presses is 0"}
    )


def serve(log: Path, *flags: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """Start the Space and wait up to two minutes until it answers.

    Args:
        log: File for the output of the Space.
        flags: Command-line flags of app.py.
        environment: Additional environment variables.

    Returns:
        The process and the URL.

    Raises:
        RuntimeError: If the Space does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(SPACE), "--port", str(port), *flags],
            env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return process, url
    process.kill()
    raise RuntimeError(f"the Space did not start:\n{log.read_text(encoding='utf-8')}")


def drive_in_browser(url: str, presses: int, screenshot: Path | None = None) -> dict[str, float]:
    """Measure the latency of key presses and the frame rate while a key is held.

    With `screenshot`, also write a screenshot of the page.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1180, "height": 780})
        page.goto(url)
        page.locator(".pictures button").nth(3).click()
        page.locator(".begin").wait_for(state="hidden")
        for index in range(presses + 1):
            page.keyboard.down(KEYS[index % 4])
            page.wait_for_timeout(300 + 37 * (index % 5))
            page.keyboard.up(KEYS[index % 4])
            # press the next key alternately while the model is still running and after it has stopped
            page.wait_for_timeout(700 if index % 2 else 1500)
        page.keyboard.down(KEYS[0])
        page.wait_for_timeout(1000)
        shown = page.evaluate("document.querySelector('.drive').figures.shown.length")
        page.wait_for_timeout(10_000)
        page.keyboard.up(KEYS[0])
        figures = page.evaluate("document.querySelector('.drive').figures")
        if screenshot is not None:
            page.get_by_role("button", name="Reset").click()
            page.locator(".count").wait_for(state="hidden")
            page.keyboard.down(KEYS[0])
            page.wait_for_timeout(300)
            page.keyboard.up(KEYS[0])
            page.wait_for_timeout(3000)
            with temporary_path(screenshot) as partial:
                page.screenshot(path=partial)
        browser.close()
    times = np.array(figures["shown"][shown:])
    latencies = np.array(figures["latencies"][1:])  # the first press is a warm-up
    return {
        "presses": len(latencies),
        "latency_ms": float(np.median(latencies)),
        "latency_ms_p95": float(np.percentile(latencies, 95)),
        "frames_per_second": float((len(times) - 1) / (times[-1] - times[0]) * 1000),
        "longest_pause_ms": float(np.diff(times).max()),
    }


class User(threading.Thread):
    """User that drives through gradio_client."""

    def __init__(self, url: str, arguments: SpaceArguments, until: threading.Event) -> None:
        super().__init__()
        self.url, self.arguments, self.until = url, arguments, until
        self.waits: list[float] = []  # seconds per request
        self.errors: list[str] = []

    def run(self) -> None:
        """Drive until `until` is set."""
        try:
            client = Client(self.url, verbose=False)
            session, _, space = client.predict(self.arguments.model, "frame 1", None, 0, api_name="/start")
            rng = np.random.default_rng()
            pace = self.arguments.chunk_length / space["fps"]
            while not self.until.is_set():
                begin = time.perf_counter()
                command = rng.uniform(-1, 1, len(space["names"])).tolist()
                frames, _ = client.predict(session, command, self.arguments.chunk_length, 1.0, api_name="/drive")
                assert len(frames) == self.arguments.chunk_length
                self.waits.append(time.perf_counter() - begin)
                self.until.wait(max(0.0, begin + pace - time.perf_counter()))
            client.predict(session, api_name="/stop")
        except Exception as error:  # any exception counts as an error of the Space
            self.errors.append(repr(error))


def drive_together(url: str, arguments: SpaceArguments, process: psutil.Process) -> dict[str, Any]:
    """Run concurrent users; return frame rates, waits and errors, and the server's memory and CPU use."""
    before, until = process.memory_info().rss, threading.Event()
    users = [User(url, arguments, until) for _ in range(arguments.users)]
    for user in users:
        user.start()
    memory = []
    begin, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
    while (passed := time.perf_counter() - begin) < arguments.seconds:
        time.sleep(min(1.0, arguments.seconds - passed))
        memory.append(process.memory_info().rss)
    cpu = sum(process.cpu_times()[:2]) - cpu
    until.set()
    for user in users:
        user.join()
    rates = [len(user.waits) * arguments.chunk_length / arguments.seconds for user in users]
    waits = np.concatenate([user.waits for user in users])
    return {
        "users": arguments.users,
        "seconds": arguments.seconds,
        "requests": len(waits),
        "errors": [error for user in users for error in user.errors],
        "frames_per_second_each": [min(rates), float(np.median(rates)), max(rates)],
        "wait_ms": [float(1000 * value) for value in np.percentile(waits, [50, 95, 100])],
        "server_cores": cpu / arguments.seconds,
        "memory_mb": [value / 1e6 for value in (before, memory[len(memory) // 2], max(memory), memory[-1])],
    }


def main() -> None:
    (arguments,) = HfArgumentParser(SpaceArguments).parse_args_into_dataclasses()
    folder = tempfile.TemporaryDirectory()
    if arguments.output:
        check_output(arguments.output, ".json")
    process, url = serve(Path(folder.name) / "space.log", "--model", arguments.model, "--visitor-sessions", "32")
    report: dict[str, Any] = {"load": os.getloadavg(), "cores": len(os.sched_getaffinity(0))}
    try:
        if arguments.presses:
            report["browser"] = drive_in_browser(url, arguments.presses, arguments.screenshot)
            print(
                "{presses} key presses: latency {latency_ms:.0f} ms median, {latency_ms_p95:.0f} ms 95th percentile; "
                "{frames_per_second:.1f} frames/s shown, longest pause {longest_pause_ms:.0f} ms".format(
                    **report["browser"]
                ),
                flush=True,
            )
        report["together"] = drive_together(url, arguments, psutil.Process(process.pid))
        together = report["together"]
        print(
            "{} users, {:.0f} s: {} requests, {} errors; frames/s per user {:.1f} to {:.1f}; wait {:.0f} ms median, {:.0f} ms "
            "95th percentile; server memory {:.0f} MB before, {:.0f} halfway, {:.0f} at the end; {:.2f} cores".format(
                together["users"],
                together["seconds"],
                together["requests"],
                len(together["errors"]),
                together["frames_per_second_each"][0],
                together["frames_per_second_each"][2],
                *together["wait_ms"][:2],
                *(together["memory_mb"][index] for index in (0, 1, 3)),
                together["server_cores"],
            )
        )
    finally:
        process.terminate()
        process.wait(20)
        folder.cleanup()
    if arguments.output:
        write_text(arguments.output, json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
