"""Public entries of a diffusers config."""

from typing import Any


def public_config(config: Any) -> dict[str, Any]:
    """Return the entries of a diffusers config without private ones, such as `_name_or_path`."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
