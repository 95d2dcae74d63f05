"""Choose and check the columns of actions and states."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ACTION_NAME = re.compile(r"actions?([._/].+)?")
"""Names under which datasets store actions; names that match `PADDING_NAME` are excluded."""
PADDING_NAME = re.compile(r".*(is_pad|pad_mask|mask)")
"""Names of padding masks, such as `action_is_pad`."""


def choose_action_columns(
    action_column: str | Sequence[str] | None, columns: Sequence[str], name: str
) -> tuple[str, ...]:
    """Choose the action columns, in the order in which they are concatenated.

    Args:
        action_column: Requested columns; None or empty selects `action`, or the only column with a similar name.
        columns: Names of the columns that may contain actions.
        name: Name of the dataset, for error messages.

    Raises:
        ValueError: If a column does not exist, or the action column is missing or ambiguous.
    """
    if action_column:
        chosen = (action_column,) if isinstance(action_column, str) else tuple(action_column)
        for column in chosen:
            if column not in columns:
                raise ValueError(
                    f"`action_column` (--action_column) must be among {sorted(columns)} in {name!r}, got {column!r}."
                )
        return chosen
    candidates = [key for key in columns if ACTION_NAME.fullmatch(key) and not PADDING_NAME.fullmatch(key)]
    if "action" in candidates:
        return ("action",)
    if len(candidates) == 1:
        return (candidates[0],)
    found = f"the candidates are {candidates}" if candidates else f"no action column was found in {list(columns)}"
    raise ValueError(
        f"{name!r} has no column 'action', and {found}: select one or more with `action_column` (--action_column); "
        "several are concatenated."
    )


def component_names_of(columns: Mapping[str, tuple[Any, int]]) -> list[str] | None:
    """Join the component names of columns; a column without names gets `<column>.<index>`.

    The result is None if no column has names.

    Args:
        columns: For each column, its component names, in any form that LeRobot uses, and its width.
    """
    known = {column: _flat_names(names, width) for column, (names, width) in columns.items()}
    if all(names is None for names in known.values()):
        return None
    return [
        name
        for column, names in known.items()
        for name in names or [f"{column}.{index}" for index in range(columns[column][1])]
    ]


def _flat_names(names: Any, width: int) -> list[str] | None:
    """Return `width` names from a list or from a mapping of names to indices; None for anything else.

    The list may be nested in another list or under a key.
    """
    if isinstance(names, Mapping):
        values = list(names.values())
        names = list(names) if all(isinstance(value, int) for value in values) else values[0]
    if isinstance(names, list | tuple) and len(names) == 1 and isinstance(names[0], list | tuple):
        names = names[0]
    return [str(name) for name in names] if isinstance(names, list | tuple) and len(names) == width else None


def finite_vector(values: Any, key: str, place: str = "") -> np.ndarray:
    """Convert the numbers of a vector, one row per frame, to float32.

    Args:
        values: Numbers (T, D) or (T,); an entry None counts as a missing number.
        key: Name of the vector, for error messages.
        place: The file, for error messages.

    Raises:
        ValueError: If there is only a single number, rows differ in length, or a value is missing, is not a number, or is not
            finite in float32.
    """
    where = f"{place!r}: " if place else ""
    try:
        array = np.asarray(values)
        if array.dtype.kind in "US":
            raise ValueError("got strings")
        if array.ndim == 0:
            raise ValueError(f"got a single value {array.item()!r}")
        with np.errstate(over="ignore"):
            result = array.astype(np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{where}{key!r} must be numbers in rows of equal length: {str(error).rstrip('.')}."
        ) from error
    finite = np.isfinite(result).all(axis=tuple(range(1, result.ndim)))
    if not finite.all():
        frame = int(np.argmin(finite))
        raise ValueError(
            f"{where}{key!r} must be finite in float32, got {np.asarray(values)[frame].tolist()} at frame {frame}: fix the "
            "recording, or omit the episode or the column."
        )
    return result
