"""The `irasim` command."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from . import __version__
from .commands import adapt, convert, data, evaluate, evaluate_policies, generate, plan, play
from .commands.files import read_actions  # noqa: F401 - earlier versions had the readers here
from .commands.files import read_media as read_frames  # noqa: F401

__all__ = ["main"]

ARGUMENT = re.compile(r"^`([a-z0-9_]+)`(?! \()|`[a-z0-9_]+` \(--([a-z0-9_-]+)\)")
"""Pattern of an argument of the library at the start of an error message, or with its flag anywhere."""
EXAMPLE_FLAG = re.compile(r"(?<![\w/-])--[a-z]+(?:_[a-z]+)+")
"""Pattern of the example scripts' flags in error messages. The commands spell the same flags with hyphens."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None for the arguments of the process.

    Returns:
        Exit status: 0 on success; 2 after an error, which is reported in one line on stderr; 130 after Ctrl-C; 143 after SIGTERM.

    Raises:
        SystemExit: After `--help`, `--version` (status 0) or arguments that cannot be parsed (status 2).
    """
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:  # print the usage of the command, not of `irasim` as argparse would
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.argv = sys.argv[1:] if argv is None else argv
    try:
        with _sigterm_as_exception():
            arguments.run(arguments)
    except (ValueError, OSError, SafetensorError) as error:  # SafetensorError: damaged file or full disk
        message = " ".join(str(error).split()) or type(error).__name__
        message = _name_flags(message, vars(arguments))
        print(f"irasim: error: {message}", file=sys.stderr)
        return 2
    except _Terminated:
        print("irasim: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("irasim: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _name_flags(message: str, flags: Mapping[str, Any]) -> str:
    """Replace arguments of the library and flags of the examples in an error by flags of the command.

    A name at the start of the message is replaced if its flag has a value; otherwise, it may be an entry of a file. A name that
    is followed by `(--flag)` is always replaced.
    """

    def flag(found: re.Match) -> str:
        name = (found[1] or found[2]).replace("-", "_")
        value = flags.get(name)
        is_flag = name in flags and (found[2] or not (value is None or value is False))
        return f"--{name.replace('_', '-')}" if is_flag else found[0]

    message = ARGUMENT.sub(flag, message)
    return EXAMPLE_FLAG.sub(lambda flag: flag[0].replace("_", "-"), message)


class _Terminated(BaseException):
    """Raised when the process receives SIGTERM."""


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise `_Terminated` on SIGTERM, so that temporary files are removed as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _path(text: str) -> Path:
    """Convert the value of a flag to a path; an empty one would name the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty value")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="irasim", description="Robot world models based on IRASim.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in (generate, plan, play, convert, adapt, data, evaluate, evaluate_policies):
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.set_defaults(parser=subparser)
        subparser.register("type", Path, _path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
