"""Infer from recorded states whether actions are target positions or motions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .episode import EpisodeSource

EPISODES = 20
"""Maximum number of episodes that are compared."""


def infer_action_space(source: EpisodeSource) -> str | None:
    """Infer from the states whether recorded actions are target positions or motions.

    Target positions correlate with the next state, and motions with the change of the state. Correlation does not depend on
    units, and remains high if the robot follows its targets with a delay. The median over the components decides, because a
    gripper may be controlled differently from the arm.

    Args:
        source: Data source with recorded actions and states. A state is compared if it contains all action components
            by name, or has as many components as the actions. States whose names start with `next.` are ignored.

    Returns:
        `"absolute"`, `"relative"`, or None if no state can be compared or the result is not clear.
    """
    episodes = []
    for number in range(min(len(source), EPISODES)):
        try:
            episodes.append(source.vectors(number))
        except ValueError:  # errors are reported when the episode is read
            continue
    keys = {key for vectors in episodes for key in vectors if key != "action" and not key.startswith("next.")}
    verdicts = {_compare(source, key, [vectors for vectors in episodes if key in vectors]) for key in keys} - {None}
    return verdicts.pop() if len(verdicts) == 1 else None


def _compare(source: EpisodeSource, key: str, episodes: Sequence[dict[str, np.ndarray]]) -> str | None:
    columns = _matching_columns(source, key, episodes[0])
    if columns is None:
        return None
    widths = [(vectors["action"].shape[1], vectors[key].shape[1]) for vectors in episodes]
    if len(set(widths)) > 1:  # reported when the episodes are mixed
        return None
    actions = np.concatenate([vectors["action"][:-1] for vectors in episodes]).astype(np.float64)
    states = np.concatenate([vectors[key][1:, columns] for vectors in episodes]).astype(np.float64)
    changes = np.concatenate([np.diff(vectors[key][:, columns], axis=0) for vectors in episodes]).astype(np.float64)
    target, motion = _correlation(actions, states), _correlation(actions, changes)
    if target > 0.8 and target > motion:
        return "absolute"
    return "relative" if motion > 0.5 and motion > target else None


def _matching_columns(source: EpisodeSource, key: str, vectors: dict[str, np.ndarray]) -> list[int] | None:
    """Return the columns of a state that correspond to the components of the actions, or None."""
    names, own = source.component_names("action"), source.component_names(key)
    if names and own and set(names) <= set(own):
        return [own.index(name) for name in names]
    width = vectors["action"].shape[1]
    return list(range(width)) if vectors[key].shape[1] == width else None


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the median correlation of two series (T, A) over components that change in both; else 0."""
    first, second = first - first.mean(0), second - second.mean(0)
    scales = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    moving = scales > 1e-9
    return float(np.median((first * second).sum(0)[moving] / scales[moving])) if moving.any() else 0.0
