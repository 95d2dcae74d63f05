"""`irasim play`: drive the robot with the keyboard, in a terminal."""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from .. import embedded_checkpoint
from .files import check_flag_ranges, check_output, named_flags, read_actions
from .history import add_history_flags, check_start, frame_files
from .keys import SAME_KEYS, key_command, key_controls
from .sampling import add_sampling_flags, check_sampling_flags, open_start
from .terminal import ARROWS, Keys, check_terminal, draw, open_terminal, write

if TYPE_CHECKING:
    from .. import DrivingSession

SYMBOLS = dict(zip(ARROWS, "↑↓→←", strict=True))
INTERRUPT = "\x03"  # Ctrl-C
END = {"q", INTERRUPT}
RESET = {"0", "Backspace"}
MAX_SPEED = 1000  # in normalized units per frame
UNDO = ("u", "z")  # the first one that does not steer the robot is used


def add_parser(subparsers: Any) -> None:
    """Add `play` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "play",
        help="drive the robot with the keyboard",
        description="Drive the robot with the keyboard, in a terminal, and save the video and the actions. Without arguments, the "
        "embedded Push-T model starts from the first frames of its held-out clip.",
    )
    parser.set_defaults(run=run)
    add_history_flags(parser)
    add_sampling_flags(parser, dtype="auto")
    add = parser.add_argument
    add(
        "--start",
        type=float,
        nargs="+",
        metavar="VALUE",
        help="current position as an action; required for absolute actions with --frames",
    )
    add(
        "--speed",
        type=float,
        default=0.5,
        help="speed while a key is held, in normalized units per frame (default: %(default)s)",
    )
    add(
        "--chunk-length",
        type=int,
        default=2,
        help="frames per chunk; larger chunks increase throughput and latency (default: %(default)s)",
    )
    add("--script", help="drive by a script instead of keys, without a terminal: 'right*10 hold*5 up+right*10'")
    add(
        "--output",
        type=Path,
        default=Path("drive.mp4"),
        help="mp4 to write; a .npy of the actions is written next to it (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check the input, drive by keys or a script, and save the recording, also after an error."""
    from .. import DrivingSession

    if arguments.script is None:
        check_terminal()
    inputs = [path for row in frame_files(arguments) for path in row]
    check_output(arguments.output, ".mp4", inputs)
    check_output(arguments.output.with_suffix(".npy"), ".npy", inputs)
    check_sampling_flags(arguments)
    check_start(arguments)
    if not 0 < arguments.speed <= MAX_SPEED:
        raise ValueError(f"--speed must be positive and at most {MAX_SPEED}, got {arguments.speed}.")
    check_flag_ranges(arguments, {"chunk_length": (1, DrivingSession.max_chunk)})
    session = _open_session(arguments)
    pace, interrupted = "", False
    try:
        if arguments.script is None:
            rate, interrupted = play(session, arguments.chunk_length)
        else:
            rate = follow(session, arguments.script, arguments.chunk_length)
        pace = f", {rate:.1f} frames/s"
    finally:  # also after a signal
        if len(session):
            wrote = session.save(arguments.output)
            print(f"frames predicted: {len(session)}{pace}; wrote {' and '.join(map(str, wrote))}")
    if not len(session):
        print("no frames were predicted; nothing was written")
    if interrupted:
        raise KeyboardInterrupt


def _open_session(arguments: argparse.Namespace) -> DrivingSession:
    from .. import DrivingSession, Steering

    start = arguments.start
    if arguments.frames is None and start is None:
        start = read_actions(embedded_checkpoint() / "example_actions.csv")[0]
    pipeline, video, history = open_start(arguments)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    if start is not None and len(start) != config.action_dim:
        raise ValueError(f"--start must have {config.action_dim} values, one per action component, got {len(start)}.")
    with named_flags(start="--start"):  # also if it was not passed
        steering = Steering(pipeline.action_space, arguments.speed, start)
    return DrivingSession(
        pipeline,
        video[:history],
        steering,
        arguments.seed,
        num_inference_steps=arguments.steps,
        resize=arguments.resize,
    )


def play(session: DrivingSession, chunk_length: int = 2) -> tuple[float, bool]:
    """Drive in the terminal of standard input and output until `q`, Ctrl-C or SIGTERM.

    A thread predicts the next frames while earlier ones are shown at the checkpoint's rate. At the start, and after undo and
    reset, prediction waits for a key.

    Args:
        session: The driving session, which also records the frames.
        chunk_length: Frames per chunk. Larger chunks increase throughput and latency.

    Returns:
        Frames shown per second, measured over the last 20, and whether Ctrl-C, SIGTERM or the loss of the terminal ended the
        session.

    Raises:
        ValueError: If standard input or output is not a terminal, on Windows, or if a prediction is not finite.
    """
    check_terminal()
    screen = _Screen(session)
    try:
        with ThreadPoolExecutor(1) as worker, open_terminal() as keys:
            pressed = _drive_by_keys(session, screen, keys, _Ahead(session, chunk_length, worker))
    except KeyboardInterrupt:
        return screen.rate, True
    return screen.rate, INTERRUPT in pressed


def _drive_by_keys(session: DrivingSession, screen: _Screen, keys: Keys, ahead: _Ahead) -> set[str]:
    """Drive until a key ends the session; return the last pressed keys."""
    steering = {control.key for control in key_controls(session.steering.action_space)} | set(SAME_KEYS)
    paused = True
    screen.show(session.first_frame, paused)
    while not END & (pressed := keys.read(0.01)):
        if pressed & {screen.undo, *RESET}:
            ahead.stop()
            keys.release()
            session.reset() if RESET & pressed else session.undo(round(screen.fps))
            paused = True
            screen.show(session.last_frame, paused)
        paused = paused and not steering & pressed
        if not paused:
            ahead.predict(keys)
        if (frame := ahead.due()) is not None:
            screen.show(frame, paused)
    return pressed


def follow(session: DrivingSession, script: str, chunk_length: int = 2) -> float:
    """Drive by a script, without a terminal.

    Args:
        session: The driving session, which also records the frames.
        script: Parts separated by spaces, each with keys joined by +, or `hold`, and 1 to 999999 frames (default: 1):
            `"right*10 hold*5 up+right*10"`.
        chunk_length: Frames per chunk.

    Returns:
        Frames predicted per second.

    Raises:
        ValueError: If the script is empty or a part is invalid, before anything is predicted; later, if a prediction is not finite.
    """
    parts = [_read_part(text, session) for text in script.split()]
    if not parts:
        raise ValueError("`script` must not be empty; example: right*10.")
    space, start = session.steering.action_space, time.perf_counter()
    for pressed, count in parts:
        for done in range(0, count, chunk_length):
            session.drive(key_command(space, pressed), min(chunk_length, count - done))
    return sum(count for _, count in parts) / (time.perf_counter() - start)


def _read_part(text: str, session: DrivingSession) -> tuple[set[str], int]:
    known = {control.key for control in key_controls(session.steering.action_space)}
    names = {arrow.removeprefix("Arrow").lower(): arrow for arrow in ARROWS if arrow in known}
    names |= {key: key for key in sorted(known - set(ARROWS))}
    names |= {key: same for key, same in SAME_KEYS.items() if same in known and key not in names}
    match = re.fullmatch(r"([^*]+)(?:\*0*([1-9]\d{0,5}))?", text)
    pressed = match[1].split("+") if match else []
    if not match or set(pressed) - {"hold", *names}:
        raise ValueError(
            f"`script` must consist of parts such as up+right*10 (keys and 1 to 999999 frames), got {text!r}; the keys are "
            f"hold, {', '.join(names)}."
        )
    return {names[key] for key in pressed if key != "hold"}, int(match[2] or 1)


class _Ahead:
    """Frames predicted in another thread before they are due."""

    def __init__(self, session: DrivingSession, chunk_length: int, worker: ThreadPoolExecutor) -> None:
        self._session, self._chunk_length, self._worker = session, chunk_length, worker
        self._prediction: Future[list[PIL.Image.Image]] | None = None
        self._ready: deque[PIL.Image.Image] = deque()
        self._interval = 1 / (session.model.fps or 10)
        self._next = 0.0

    def predict(self, keys: Keys) -> None:
        """Start the next prediction with the held keys once the last one is complete and half shown."""
        if self._prediction is None and len(self._ready) <= self._chunk_length // 2:
            command = key_command(self._session.steering.action_space, keys.held())
            self._prediction = self._worker.submit(self._session.drive, command, self._chunk_length)

    def due(self) -> PIL.Image.Image | None:
        """Return the next frame if it is time to show it, None otherwise."""
        if self._prediction is not None and self._prediction.done():
            self._ready.extend(self._prediction.result())
            self._prediction = None
        now = time.monotonic()
        if not self._ready or now < self._next:
            return None
        self._next = max(self._next + self._interval, now)
        return self._ready.popleft()

    def stop(self) -> None:
        """Wait for the running prediction and drop all frames not shown."""
        if self._prediction is not None:
            self._prediction.result()
        self._prediction = None
        self._ready.clear()


class _Screen:
    """Terminal view: the frame, a status line and a key legend."""

    def __init__(self, session: DrivingSession) -> None:
        controls = key_controls(session.steering.action_space)
        keys = {control.key for control in controls}
        self.fps: float = session.model.fps or 10
        self.undo = next(key for key in UNDO if key not in keys)
        self.rate = 0.0
        self._session = session
        self._times: deque[float] = deque(maxlen=20)
        pairs = [
            f"{SYMBOLS.get(low.key, low.key)} {SYMBOLS.get(high.key, high.key)} {low.label.removesuffix(' -')}"
            for low, high in zip(controls[::2], controls[1::2], strict=True)
        ]
        self._help = "   ".join([*pairs, f"{self.undo} undo 1 s", "0 reset", "q end"])

    def show(self, frame: PIL.Image.Image, paused: bool) -> None:
        """Draw a frame and the lines below it."""
        columns, lines = shutil.get_terminal_size()
        self._count(paused)
        steering = self._session.steering
        action = "  ".join(
            f"{name} {value:.4g}" for name, value in zip(steering.action_space.names, steering.last, strict=True)
        )
        pace = "press a key to drive" if paused else f"{self.rate:4.1f} frames/s"
        status = f"{len(self._session) / self.fps:5.1f} s   {pace}   {action}"
        rows = [*draw(frame, columns, lines - 2), status[: columns - 1], self._help[: columns - 1]]
        write("\x1b[H" + "".join(f"{row}\x1b[K\r\n" for row in rows[:-1]) + f"{rows[-1]}\x1b[J")

    def _count(self, paused: bool) -> None:
        if paused:
            self._times.clear()
            return
        self._times.append(time.monotonic())
        if len(self._times) > 1:
            self.rate = (len(self._times) - 1) / (self._times[-1] - self._times[0])
