"""Driving a robot in a terminal: frames drawn with half-block characters, keys read while they are pressed."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import select
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import PIL.Image
import PIL.ImageOps

from .driving import SAME_KEYS, DrivingSession

HELD = 0.25
"""Seconds for which a key counts as held after its last press or repeat.

Terminals send no key-up. A held key repeats every 30 to 50 ms, over a slow connection in bursts, and HELD has to bridge these
gaps, or the robot stutters. A tap drives for as long and a released key lets the robot go on for as long, so it is no longer,
and shorter than the delay before the first repeat (0.25 to 0.7 s): a key that is held down pauses once.
"""

ARROWS = {"up": "ArrowUp", "down": "ArrowDown", "right": "ArrowRight", "left": "ArrowLeft"}
SYMBOLS = dict(zip(ARROWS.values(), "↑↓→←", strict=True))
END = {"q", "\x03"}  # the byte of Ctrl-C
RESET = {"0", "Backspace"}
UNDO = ("u", "z")  # the first that steers nothing: an arm's yaw is on u
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1bO.|\x1b(?!\[[0-9;?]*[ -/]*\Z|O?\Z)|[^\x1b]", re.DOTALL)


def play(session: DrivingSession, chunk_length: int = 2) -> float:
    """Drive in the terminal of standard input and output until `q`, Ctrl-C or SIGTERM; the session holds what was driven.

    Frames are predicted while those before them are shown, at the checkpoint's rate. Time stands still until the first key,
    and after undo and reset.

    Args:
        session: What is driven.
        chunk_length: Frames predicted together: more are faster, and the robot answers later.

    Returns:
        Frames shown a second, lately.

    Raises:
        ValueError: If there is no terminal.
    """
    check_terminal()
    steering = {control.key for control in session.steering.controls} | set(SAME_KEYS)
    screen = _Screen(session)
    with suppress(KeyboardInterrupt), ThreadPoolExecutor(1) as worker, open_terminal() as keys:
        ahead = _Ahead(session, chunk_length, worker)
        standing = True
        screen.show(session.first_frame, standing)
        while not END & (pressed := keys.read(0.01)):
            if pressed & {screen.undo, *RESET}:
                ahead.stop()
                keys.release()
                session.reset() if RESET & pressed else session.undo(round(screen.fps))
                standing = True
                screen.show(session.last_frame, standing)
            standing = standing and not steering & pressed
            if not standing:
                ahead.predict(keys)
            if (picture := ahead.due()) is not None:
                screen.show(picture, standing)
    return screen.rate


def follow(session: DrivingSession, script: str, chunk_length: int = 2) -> float:
    """Drive by a script, without a terminal.

    Args:
        session: What is driven.
        script: Keys joined by +, or `hold`, and for how many frames: `"right*10 hold*5 up+right*10"`.
        chunk_length: Frames predicted together.

    Returns:
        Frames predicted a second.

    Raises:
        ValueError: If the script is empty, or has a key that steers nothing; nothing has happened then.
    """
    parts = [_read_part(text, session) for text in script.split()]
    if not parts:
        raise ValueError("`script` must have one part at least, such as right*10, got none.")
    start = time.perf_counter()
    for pressed, count in parts:
        for done in range(0, count, chunk_length):
            session.drive(pressed, min(chunk_length, count - done))
    return len(session) / (time.perf_counter() - start)


def _read_part(text: str, session: DrivingSession) -> tuple[set[str], int]:
    known = {control.key for control in session.steering.controls}
    names = {name: key for name, key in ARROWS.items() if key in known}
    names |= {key: key for key in sorted(known - set(ARROWS.values()))}
    names |= {key: same for key, same in SAME_KEYS.items() if same in known and key not in names}
    match = re.fullmatch(r"([^*]+)(?:\*0*([1-9]\d{0,5}))?", text)
    pressed = match[1].split("+") if match else []
    if not match or set(pressed) - {"hold", *names}:
        raise ValueError(
            f"`script` must be of parts such as right*10, keys joined by + out of hold, {', '.join(names)}, and a number of "
            f"frames; got {text!r}."
        )
    return {names[key] for key in pressed if key != "hold"}, int(match[2] or 1)


def check_terminal() -> None:
    """Whether standard input and output are a terminal whose keys can be read one by one.

    Raises:
        ValueError: If they are not.
    """
    if importlib.util.find_spec("termios") is None:
        raise ValueError("driving with keys needs a Unix terminal, got Windows without one: use WSL, or --script.")
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        if not stream.isatty():
            raise ValueError(
                f"standard {name} must be a terminal, got a pipe or a file: run in one, or give --script."
            )


@contextmanager
def open_terminal() -> Iterator[Keys]:
    """Keys unbuffered and unechoed and an empty screen; the terminal is as it was afterwards, whatever happens."""
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    changed = termios.tcgetattr(descriptor)
    changed[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)  # Ctrl-C and Ctrl-Z arrive as keys
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, changed)
        _write("\x1b[?1049h\x1b[?25l")  # the other screen, no cursor
        yield Keys(descriptor)
    finally:
        try:
            _write("\x1b[0m\x1b[?25h\x1b[?1049l")
        finally:
            termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)  # repeats not yet read are not for the shell
            signal.signal(signal.SIGTERM, handler)


class Keys:
    """Keys of a terminal by the names of a browser's KeyboardEvent.key; what is held follows from presses and repeats.

    Args:
        descriptor: Of a terminal whose input is neither buffered nor echoed.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""
        self._last: dict[str, float] = {}  # when each key was pressed last
        self._asked = 0.0

    def read(self, timeout: float) -> set[str]:
        """Keys pressed, or repeated, since the last call; waits for one until the timeout, in seconds.

        Raises:
            KeyboardInterrupt: If the terminal is gone.
        """
        if not select.select([self._descriptor], [], [], timeout)[0]:
            return set()
        read = os.read(self._descriptor, 1024)
        if not read:
            raise KeyboardInterrupt
        pressed, self._unread = decode_keys(self._unread + read)
        self._last |= dict.fromkeys(pressed, time.monotonic())
        return set(pressed)

    def held(self) -> set[str]:
        """Keys held now; a press counts once even where HELD is over, so that no tap is lost to a slow prediction."""
        now = time.monotonic()
        since, self._asked = min(self._asked, now - HELD), now
        return {key for key, last in self._last.items() if last >= since}

    def release(self) -> None:
        """Hold nothing, until the next press."""
        self._last.clear()


def decode_keys(read: bytes) -> tuple[list[str], bytes]:
    """Names of the keys that a terminal's bytes stand for, and the bytes of a sequence that is not complete yet.

    Letters are small ones, whatever Caps Lock says. Arrows are escape sequences: plain (ESC [ A), of the keypad's application mode
    (ESC O A), or with modifiers (ESC [ 1 ; 2 A).
    """
    keys, end = [], 0
    text = read.decode("latin-1")
    while match := SEQUENCE.match(text, end):
        end = match.end()
        sequence = match[0]
        if len(sequence) == 1:
            keys.append("Backspace" if sequence in "\x7f\x08" else sequence.lower())
        elif sequence[-1] in "ABCD":
            keys.append(list(SYMBOLS)["ABCD".index(sequence[-1])])
    return keys, read[end:]


class _Ahead:
    """Frames predicted in another thread ahead of those that are due."""

    def __init__(self, session: DrivingSession, chunk_length: int, worker: ThreadPoolExecutor) -> None:
        self._session, self._chunk_length, self._worker = session, chunk_length, worker
        self._prediction: Future[list[PIL.Image.Image]] | None = None
        self._ready: deque[PIL.Image.Image] = deque()
        self._interval = 1 / (session.pipe.transformer.config.fps or 10)
        self._next = 0.0

    def predict(self, keys: Keys) -> None:
        """Begin the next prediction, with the keys held now, if the one before is done and nearly all shown."""
        if self._prediction is None and len(self._ready) <= self._chunk_length // 2:
            self._prediction = self._worker.submit(self._session.drive, keys.held(), self._chunk_length)

    def due(self) -> PIL.Image.Image | None:
        """The next frame, when it is time to show it."""
        if self._prediction is not None and self._prediction.done():
            self._ready.extend(self._prediction.result())
            self._prediction = None
        now = time.monotonic()
        if not self._ready or now < self._next:
            return None
        self._next = max(self._next + self._interval, now)
        return self._ready.popleft()

    def stop(self) -> None:
        """Wait for the prediction under way, and show none of what was predicted."""
        if self._prediction is not None:
            self._prediction.result()
        self._prediction = None
        self._ready.clear()


class _Screen:
    """The terminal: the frame as large as fits, a line of figures, a line of keys."""

    def __init__(self, session: DrivingSession) -> None:
        controls = session.steering.controls
        keys = {control.key for control in controls}
        self.fps: float = session.pipe.transformer.config.fps or 10
        self.undo = next(key for key in UNDO if key not in keys)
        self.rate = 0.0
        self._session = session
        self._times: deque[float] = deque(maxlen=20)
        pairs = [
            f"{SYMBOLS.get(low.key, low.key)} {SYMBOLS.get(high.key, high.key)} {low.label.removesuffix(' -')}"
            for low, high in zip(controls[::2], controls[1::2], strict=True)
        ]
        self._help = "   ".join([*pairs, f"{self.undo} undo 1 s", "0 reset", "q end"])

    def show(self, picture: PIL.Image.Image, standing: bool) -> None:
        """Draw a frame and what belongs below it."""
        columns, lines = shutil.get_terminal_size()
        self._count(standing)
        steering = self._session.steering
        action = "  ".join(f"{name} {value:.4g}" for name, value in zip(steering.names, steering.last, strict=True))
        pace = "press a key to drive" if standing else f"{self.rate:4.1f} frames/s"
        status = f"{len(self._session) / self.fps:5.1f} s   {pace}   {action}"
        rows = [*draw(picture, columns, lines - 2), status[: columns - 1], self._help[: columns - 1]]
        _write("\x1b[H" + "".join(f"{row}\x1b[K\r\n" for row in rows[:-1]) + f"{rows[-1]}\x1b[J")

    def _count(self, standing: bool) -> None:
        if standing:
            self._times.clear()
            return
        self._times.append(time.monotonic())
        if len(self._times) > 1:
            self.rate = (len(self._times) - 1) / (self._times[-1] - self._times[0])


def draw(picture: PIL.Image.Image, columns: int, lines: int) -> list[str]:
    """Rows of text that show a picture in 24-bit colour, as large as fits: a character is an upper and a lower pixel."""
    size = (columns, 2 * max(lines, 1))
    pixels = np.asarray(PIL.ImageOps.contain(picture.convert("RGB"), size)).tolist()
    rows = []
    for upper, lower in zip(pixels[::2], [*pixels[1::2], pixels[-1]], strict=False):
        runs = itertools.groupby(zip(upper, lower, strict=True))  # a code only where colours change: fewer bytes
        cells = [f"{_colour(38, above)}{_colour(48, below)}{'▀' * len(list(run))}" for (above, below), run in runs]
        rows.append("".join(cells) + "\x1b[0m")
    return rows


def _colour(ground: int, pixel: list[int]) -> str:
    red, green, blue = pixel
    return f"\x1b[{ground};2;{red};{green};{blue}m"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
