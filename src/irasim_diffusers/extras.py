"""How to install the optional dependencies of the package."""

INSTALL = "pip install '.[{}]' in a clone of the irasim-diffusers repository"
"""Format string of the install command; its argument is the name of an extra. The package is not on PyPI."""
