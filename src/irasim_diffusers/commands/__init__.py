"""Subcommands of `irasim`, one module each, with `add_parser` and `run`; modules that they share: files, sampling, dataset, keys, terminal.

`add_parser` must import nothing that imports torch, so that `irasim --help` starts fast; `run` imports what it needs.
"""
