"""Package version, in a module that does not import torch."""

__version__ = "0.1.0"
