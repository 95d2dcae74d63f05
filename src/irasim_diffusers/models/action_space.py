"""The action space that a network's config records, and what a network sees of an action."""

from typing import Any

import torch


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


def action_features(
    actions: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, frequencies: int
) -> torch.Tensor:
    """What a network sees of actions: `(action - offset) * scale`, joined by its sines and cosines.

    Args:
        actions: Actions (..., A) in raw units, which may need more digits than a 16-bit type has.
        scale: Scale, one or one a component, float32.
        offset: Offset, likewise.
        frequencies: Number of octaves, the longest wave 16 scaled units; 0 for none.

    Returns:
        Features (..., A (1 + 2 frequencies)), float32.
    """
    actions = (actions.float() - offset) * scale
    if not frequencies:
        return actions
    octaves = 2.0 ** torch.arange(frequencies, device=actions.device)
    phases = (actions.unsqueeze(-1) * octaves * (torch.pi / 8)).flatten(-2)
    return torch.cat([actions, phases.sin(), phases.cos()], dim=-1)
