"""Subcommands of `irasim`, one module each, with `add_parser` and `run`.

The subcommands share the modules files, sampling, dataset, keys and terminal. `add_parser` must import nothing that
imports torch, so that `irasim --help` starts fast; `run` imports what it needs.
"""
