"""The `irasim` command."""

from __future__ import annotations

import argparse
import sys

from . import __version__
from .commands import adapt, convert, data, evaluate, generate, play


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        Exit status: 0, or 2 after bad input, with one line on stderr.
    """
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"irasim: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="irasim", description="Robot world models based on IRASim.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in (generate, play, convert, adapt, data, evaluate):
        command.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
