"""Terminal input and display: keys held down, and frames drawn with half-block characters."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
import PIL.ImageOps

HELD = 0.25
"""Seconds for which a key counts as held after its last press or repeat.

Terminals do not report when a key is released. A held key repeats every 30 to 50 ms, and in bursts over a slow connection; HELD
must be longer than these gaps, or the motion is interrupted. Motion continues for HELD seconds after a key is released, so HELD
should be as short as possible. The delay before the first repeat (0.25 to 0.7 s) is usually longer than HELD: the motion then
pauses once.
"""

ARROWS = ("ArrowUp", "ArrowDown", "ArrowRight", "ArrowLeft")  # in the order of their escape codes A to D
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1bO.|\x1b(?!\[[0-9;?]*[ -/]*\Z|O?\Z)|[^\x1b]", re.DOTALL)


def check_terminal() -> None:
    """Check that standard input and output are a terminal that can be read key by key.

    Raises:
        ValueError: If standard input or output is not a terminal, or on Windows.
    """
    if importlib.util.find_spec("termios") is None:
        raise ValueError("driving with keys requires a Unix terminal, got Windows: use WSL, or --script.")
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        if not stream.isatty():
            raise ValueError(
                f"standard {name} must be a terminal, got a pipe or a file: run in a terminal, or pass --script."
            )


@contextmanager
def open_terminal() -> Iterator[Keys]:
    """Switch to the alternate screen, and read single keys without echo; restore the terminal on exit.

    SIGTERM raises KeyboardInterrupt inside the context unless the program handles it, so that the recording is saved.
    """
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    changed = termios.tcgetattr(descriptor)
    changed[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)  # Ctrl-C and Ctrl-Z arrive as keys
    handler = signal.getsignal(signal.SIGTERM)
    own = handler == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    try:
        if own:  # only the main thread may set handlers
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, changed)
        write("\x1b[?1049h\x1b[?25l")  # alternate screen, no cursor
        yield Keys(descriptor)
    finally:
        try:
            write("\x1b[0m\x1b[?25h\x1b[?1049l")
        finally:
            termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)  # discard pending key repeats
            if own:
                signal.signal(signal.SIGTERM, handler)


class Keys:
    """Keys of a terminal, named like a browser's KeyboardEvent.key; a key counts as held while it repeats.

    Args:
        descriptor: File descriptor of a terminal without buffering or echo.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""
        self._last: dict[str, float] = {}  # time of the last press by key
        self._asked = 0.0

    def read(self, timeout: float) -> set[str]:
        """Return the keys pressed or repeated since the last call; wait up to `timeout` seconds for one.

        Raises:
            KeyboardInterrupt: If the terminal was closed.
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
        """Return the keys held now and those pressed since the last call.

        A short press during a slow prediction is therefore not missed.
        """
        now = time.monotonic()
        since, self._asked = min(self._asked, now - HELD), now
        return {key for key, last in self._last.items() if last >= since}

    def release(self) -> None:
        """Forget the held keys until the next press."""
        self._last.clear()


def decode_keys(read: bytes) -> tuple[list[str], bytes]:
    """Decode a terminal's bytes into key names; also return the bytes of an incomplete last sequence.

    Letters become lower case. Arrows are escape sequences: plain (ESC [ A), in the keypad's application mode (ESC O A), or with
    modifiers (ESC [ 1 ; 2 A).
    """
    keys, end = [], 0
    text = read.decode("latin-1")
    while match := SEQUENCE.match(text, end):
        end = match.end()
        sequence = match[0]
        if len(sequence) == 1:
            keys.append("Backspace" if sequence in "\x7f\x08" else sequence.lower())
        elif sequence[-1] in "ABCD":
            keys.append(ARROWS["ABCD".index(sequence[-1])])
    return keys, read[end:]


def draw(image: PIL.Image.Image, columns: int, lines: int) -> list[str]:
    """Draw an image as rows of text in 24-bit color, as large as fits.

    A character shows two pixels, one above the other.
    """
    size = (columns, 2 * max(lines, 1))
    pixels = np.asarray(PIL.ImageOps.contain(image.convert("RGB"), size)).tolist()
    rows = []
    for upper, lower in zip(pixels[::2], [*pixels[1::2], pixels[-1]], strict=False):
        runs = itertools.groupby(zip(upper, lower, strict=True))  # one code per run of equal colors, to save bytes
        cells = [f"{_color(38, above)}{_color(48, below)}{'▀' * len(list(run))}" for (above, below), run in runs]
        rows.append("".join(cells) + "\x1b[0m")
    return rows


def _color(ground: int, pixel: list[int]) -> str:
    red, green, blue = pixel
    return f"\x1b[{ground};2;{red};{green};{blue}m"


def write(text: str) -> None:
    """Write text to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
