"""The action space of a checkpoint: components, units, bounds, scaling and the hold action."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from .actions import DERIVATIONS, MOTION_COMPONENTS, hold_action, prepare_actions

if TYPE_CHECKING:
    import gymnasium

KINDS = ("relative", "absolute")
MARGIN = 1000.0
"""Margin beyond finite bounds, in normalized units, unless their width is larger."""
UNBOUNDED_LIMIT = 1e4
"""Margin where a bound is missing, in normalized units; see `ActionSpace.prepare`."""

Actions = TypeVar("Actions", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class ActionSpace:
    """The action space of a checkpoint. Tuples have one entry per component.

    `hold`, `normalise`, `denormalise` and `clip` take and return arrays or tensors (..., A) of any batch shape.
    """

    names: tuple[str, ...]
    units: tuple[str | None, ...]  # None: the units of the recording
    low: tuple[float, ...]  # raw units; -inf where unknown
    high: tuple[float, ...]  # raw units; inf where unknown
    scale: tuple[float, ...]  # normalized = (raw - offset) * scale
    offset: tuple[float, ...]
    kind: str = "relative"  # "relative": motions, unless `derivation` is "absolute"; "absolute": target positions
    derivation: str = "recorded"  # "recorded", or how actions are computed from states, see `actions.DERIVATIONS`

    @classmethod
    def from_config(cls, config: Any) -> ActionSpace:
        """Read and check the action space of a model's config.

        Args:
            config: Config of a model: a mapping or an object with the attributes `action_dim`, `action_scale` and so on.

        Raises:
            ValueError: If `action_dim` is not a positive integer or too small for `relative_6d`, the kind or the derivation is
                unknown, a list does not have `action_dim` entries, or a value is invalid.
        """

        def read(name: str, default: Any = None) -> Any:
            return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)

        size, kind = read("action_dim"), read("action_space", "relative")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`action_dim` must be an integer of at least 1, got {size!r}.")
        if kind not in KINDS:
            raise ValueError(f"`action_space` must be one of {', '.join(KINDS)}, got {kind!r}.")

        derivation = read("action_derivation", "recorded")
        if derivation not in DERIVATIONS:
            raise ValueError(f"`action_derivation` must be one of {', '.join(DERIVATIONS)}, got {derivation!r}.")
        if derivation == "relative_6d" and size < (fewest := MOTION_COMPONENTS[derivation]):
            raise ValueError(
                f"`action_dim` must be at least {fewest} for `action_derivation` {derivation!r}, got {size}."
            )

        def numbers(name: str, default: float) -> tuple[float, ...]:
            return _numbers(name, read(name), size, default)

        scale, offset = numbers("action_scale", 1.0), numbers("action_offset", 0.0)
        if not all(math.isfinite(value) and value for value in scale):
            raise ValueError(f"`action_scale` must be finite and not zero, got {list(scale)}.")
        if not all(math.isfinite(value) for value in offset):
            raise ValueError(f"`action_offset` must be finite, got {list(offset)}.")
        low, high = numbers("action_low", -math.inf), numbers("action_high", math.inf)
        for index, (least, most) in enumerate(zip(low, high, strict=True)):
            if not least <= most:
                raise ValueError(
                    f"`action_low` must be at most `action_high`, got {least} and {most} for component {index}."
                )
        names, units = (_texts(name, read(name), size) for name in ("action_names", "action_units"))
        return cls(
            names=tuple(f"action {index}" if name is None else name for index, name in enumerate(names)),
            units=tuple(units),
            low=low,
            high=high,
            scale=scale,
            offset=offset,
            kind=kind,
            derivation=derivation,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_targets(self) -> bool:
        """Whether actions are target positions, not motions."""
        return self.kind == "absolute" or self.derivation == "absolute"

    def hold(self, last_action: Actions) -> Actions:
        """Return the action for no motion after `last_action`.

        Args:
            last_action: Actions (..., A), raw units.

        Returns:
            Actions (..., A): unchanged if they are target positions, otherwise no motion. Components that follow the motion of a
            pose, such as a gripper opening, are also unchanged; see `actions.hold_action`.
        """
        held = hold_action(torch.as_tensor(last_action), self.kind, self.derivation)
        return held if torch.is_tensor(last_action) else held.numpy()

    def normalise(self, actions: Actions) -> Actions:
        """Normalize raw actions (..., A) as the network does: `(actions - offset) * scale`.

        Integers become floats.
        """
        actions = _floating(actions)
        return (actions - _as(self.offset, actions)) * _as(self.scale, actions)

    def denormalise(self, actions: Actions) -> Actions:
        """Convert normalized actions (..., A) to raw ones, the inverse of `normalise`."""
        actions = _floating(actions)
        return actions / _as(self.scale, actions) + _as(self.offset, actions)

    def clip(self, actions: Actions) -> Actions:
        """Clip raw actions (..., A) to the bounds. Integers become floats."""
        actions = _floating(actions)
        low, high = _as(self.low, actions), _as(self.high, actions)
        if torch.is_tensor(actions):
            return actions.clamp(low, high)
        return np.clip(actions, low, high)

    def prepare(self, actions: Any) -> torch.Tensor:
        """Check raw actions and convert them to a batch.

        The bounds are usually those of the training data. Actions may exceed them by the width of the bounds, or by 1,000
        normalized units if that is more. In a direction without a bound, they may lie up to 10,000 normalized units beyond the
        offset, or beyond the other bound if it is farther.

        Args:
            actions: Actions (n, A) or (B, n, A): arrays, tensors or nested lists, raw units.

        Returns:
            Actions (B, n, A), float32.

        Raises:
            ValueError: If actions are empty, ragged, not numbers or not finite, do not have one of these shapes, or are far outside
                the bounds.
        """
        checked = prepare_actions(actions, len(self))
        limits = self._limits()
        low, high = (_as(bounds, checked) for bounds in limits)
        outside = (checked < low) | (checked > high)
        if outside.any():
            place = tuple(torch.nonzero(outside)[0].tolist())
            component = place[-1]
            lowest, highest = (limit[component] for limit in limits)
            least, most = self.low[component], self.high[component]
            least, most = (least if math.isfinite(least) else lowest), (most if math.isfinite(most) else highest)
            raise ValueError(
                f"`actions` must be near the bounds of this checkpoint, [{least:g}, {most:g}] for {self.names[component]!r}, got "
                f"{checked[place].item():g} at index {place} of (B, n, A); {lowest:g} to {highest:g} are accepted: check the "
                "units; `action_space.clip(actions)` limits components that have bounds."
            )
        return checked

    def box(self) -> gymnasium.spaces.Box:
        """Return the bounds as a `gymnasium.spaces.Box` (A,), float32.

        Raises:
            ImportError: If Gymnasium is not installed.
        """
        try:
            from gymnasium.spaces import Box
        except ImportError as error:
            raise ImportError("`ActionSpace.box` requires Gymnasium: pip install gymnasium") from error
        low, high = np.array(self.low, dtype=np.float32), np.array(self.high, dtype=np.float32)
        return Box(low, high, dtype=np.float32)

    def _limits(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the lowest and the highest raw actions that are accepted."""
        lowest, highest = [], []
        for low, high, scale, offset in zip(self.low, self.high, self.scale, self.offset, strict=True):
            unit = 1 / abs(scale)
            width = high - low
            margin = max(width if math.isfinite(width) else 0.0, MARGIN * unit)
            lowest.append(low - margin if math.isfinite(low) else min(offset, high) - UNBOUNDED_LIMIT * unit)
            highest.append(high + margin if math.isfinite(high) else max(offset, low) + UNBOUNDED_LIMIT * unit)
        return tuple(lowest), tuple(highest)


def _entries(name: str, value: Any, size: int, default: Any) -> list[Any]:
    """Expand a value of the config to one entry per component."""
    if not isinstance(value, list | tuple):
        return [default if value is None else value] * size
    if len(value) != size:
        raise ValueError(f"`{name}` must have `action_dim` = {size} entries, one per component, got {len(value)}.")
    return [default if entry is None else entry for entry in value]


def _numbers(name: str, value: Any, size: int, default: float) -> tuple[float, ...]:
    entries = _entries(name, value, size, default)
    for entry in entries:
        if not isinstance(entry, int | float | np.number) or isinstance(entry, bool):
            raise ValueError(f"`{name}` must contain numbers, got {entry!r}.")
    try:
        return tuple(float(entry) for entry in entries)
    except OverflowError as error:
        raise ValueError(f"`{name}` must contain numbers in the range of a float, got a larger integer.") from error


def _texts(name: str, value: Any, size: int) -> list[str | None]:
    entries = _entries(name, value, size, None)
    valid = value is None or isinstance(value, list | tuple)
    for entry in entries if valid else [value]:
        if not valid or not isinstance(entry, str | None):
            raise ValueError(f"`{name}` must be a list of strings or None, got {entry!r}.")
    return entries


def _floating(actions: Any) -> Any:
    """Convert a tensor of integers to float32; integer arrays become floats in the caller's arithmetic."""
    return actions.float() if torch.is_tensor(actions) and not actions.is_floating_point() else actions


def _as(values: tuple[float, ...], like: Any) -> Any:
    """Return values (A,) as an array, or as a tensor of the dtype and on the device of `like`."""
    if torch.is_tensor(like):
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    return np.array(values)
