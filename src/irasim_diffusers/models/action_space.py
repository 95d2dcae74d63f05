"""The action space that a network's config records."""

from typing import Any


def check_action_space(config: Any) -> None:
    """Refuse an action space of an unknown kind, or whose parts do not have one entry a component.

    Raises:
        ValueError: Names the field of the config, what was wanted and what came.
    """
    if config.action_space not in ("relative", "absolute"):
        raise ValueError(f"`action_space` must be one of relative, absolute, got {config.action_space!r}.")
    size = config.action_dim
    for name in ("action_scale", "action_offset", "action_names", "action_units", "action_low", "action_high"):
        values = config[name]
        if isinstance(values, list | tuple) and len(values) != size:
            raise ValueError(f"`{name}` must have `action_dim` = {size} entries, one a component, got {len(values)}.")
    low, high = (
        bounds if isinstance(bounds, list | tuple) else [bounds] * size
        for bounds in (config.action_low, config.action_high)
    )
    for index, (least, most) in enumerate(zip(low, high, strict=True)):
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"`action_low` must not exceed `action_high`, got {least} and {most} for component {index}."
            )
