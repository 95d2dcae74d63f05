"""The action space that a network's config records."""

from typing import Any


def check_action_space(
    action_dim: int,
    action_space: str,
    action_scale: float | list[float],
    action_offset: float | list[float],
    action_names: list[str] | None,
    action_units: list[str] | None,
) -> None:
    """Refuse an action space of an unknown kind, or whose parts do not have one entry a component.

    Raises:
        ValueError: Names the field of the config, what was wanted and what came.
    """
    if action_space not in ("relative", "absolute"):
        raise ValueError(f"`action_space` must be one of relative, absolute, got {action_space!r}.")
    parts: dict[str, Any] = {
        "action_scale": action_scale,
        "action_offset": action_offset,
        "action_names": action_names,
        "action_units": action_units,
    }
    for name, values in parts.items():
        if isinstance(values, list | tuple) and len(values) != action_dim:
            raise ValueError(
                f"`{name}` must have `action_dim` = {action_dim} entries, one a component, got {len(values)}."
            )
