"""Package version and install command; importing this module does not import torch."""

__version__ = "0.1.0"

INSTALL = "pip install '.[{}]' in a clone of the irasim-diffusers repository"
"""Format string of the install command; its argument is the name of an extra. The package is not on PyPI."""
