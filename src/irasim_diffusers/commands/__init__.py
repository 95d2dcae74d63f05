"""Subcommands of `irasim`, one module each, with `add_parser` and `run`.

The modules dataset, files, history, keys, loading, sampling and terminal contain parts of subcommands. The names below are public,
because the Space and the examples use them, too. No module here may import torch, directly or through another module, when it is
imported or in `add_parser`, so that `irasim --help` starts fast; `run` and the other functions import what they need.
"""

from .files import IMAGE_SUFFIXES, check_output, read_actions
from .keys import SAME_KEYS, key_command, key_controls
from .loading import load_checked
from .sampling import check_device
from .terminal import draw

__all__ = [
    "IMAGE_SUFFIXES",
    "SAME_KEYS",
    "check_device",
    "check_output",
    "draw",
    "key_command",
    "key_controls",
    "load_checked",
    "read_actions",
]
