"""The action space that a network's config records."""

from typing import Any


def check_action_space(
    action_dim: int,
    action_space: str,
    action_scale: float | list[float],
    action_offset: float | list[float],
    action_names: list[str] | None,
    action_units: list[str] | None,
    action_low: float | list[float | None] | None,
    action_high: float | list[float | None] | None,
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
        "action_low": action_low,
        "action_high": action_high,
    }
    for name, values in parts.items():
        if isinstance(values, list | tuple) and len(values) != action_dim:
            raise ValueError(
                f"`{name}` must have `action_dim` = {action_dim} entries, one a component, got {len(values)}."
            )
    low, high = (
        bounds if isinstance(bounds, list | tuple) else [bounds] * action_dim for bounds in (action_low, action_high)
    )
    for index, (least, most) in enumerate(zip(low, high, strict=True)):
        if least is not None and most is not None and least >= most:
            raise ValueError(
                f"`action_low` must be below `action_high`, got {least} and {most} for component {index}."
            )
