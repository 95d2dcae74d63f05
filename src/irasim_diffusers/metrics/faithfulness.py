"""Action faithfulness of a world model, measured on recorded clips without a simulator.

From one history, the model predicts the futures under the true actions, under the actions of clips with a similar history,
and under altered actions. The prediction of a faithful model is closest to the truth under the true actions. A model that
ignores its actions predicts the same future each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .intervals import bootstrap

Predict = Callable[[np.ndarray, np.ndarray], torch.Tensor]
"""Function from a history (h, H, W, 3), uint8, and actions (K, n, A) to futures (K, n, 3, H, W) in [0, 1].
The K futures must use the same noise, so that only the actions differ."""

ALTERATIONS = ("shuffled", "held", "reversed")
STRATA = ("little motion", "some motion", "much motion")
"""Thirds of the clips by the motion in the true frames. Clips with little motion contain little information."""
FEWEST = 8
"""Minimum number of clips with much motion for a verdict."""
ROUNDING = (1 / 255) ** 2 / 12
"""Mean squared rounding error of 8-bit images, the smallest error that is distinguished."""


@dataclass(frozen=True)
class Counterfactuals:
    """Action sequences under which the future of each clip is predicted."""

    true: np.ndarray  # (N, n, A)
    matched: np.ndarray  # (N, W - 1, n, A), actions of the clips with the most similar history
    altered: dict[str, np.ndarray]  # (N, n, A) for each of ALTERATIONS

    def of_clip(self, number: int) -> np.ndarray:
        """Return all K = W + 3 sequences (K, n, A) of one clip: true, matched and altered ones."""
        altered = [self.altered[name][number] for name in ALTERATIONS]
        return np.stack([self.true[number], *self.matched[number], *altered])


def counterfactual_actions(
    last_frames: np.ndarray, actions: np.ndarray, holds: np.ndarray, ways: int = 4, seed: int = 0
) -> Counterfactuals:
    """Choose the counterfactual actions of each clip.

    Args:
        last_frames: Last history frame of each clip (N, H, W, 3).
        actions: True actions (N, n, A).
        holds: Hold action of each clip (N, A); see `actions.hold_action`.
        ways: Number W of sequences for the identification, including the true one.
        seed: Seed of the shuffling, which gives each clip the actions of another clip.

    Raises:
        ValueError: If there are fewer than two ways, fewer clips than ways, or the shapes do not match.
    """
    if not 2 <= ways <= len(actions):
        raise ValueError(f"`ways` must be at least 2 and at most {len(actions)}, the number of clips, got {ways}.")
    if len(last_frames) != len(actions) or holds.shape != (len(actions), actions.shape[-1]):
        raise ValueError(
            "`last_frames`, `actions` and `holds` must be (N, H, W, 3), (N, n, A) and (N, A), got "
            f"{last_frames.shape}, {actions.shape} and {holds.shape}."
        )
    order = np.random.default_rng(seed).permutation(len(actions))
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)
    altered = {
        "shuffled": actions[partner],
        "held": np.broadcast_to(holds[:, None], actions.shape),
        "reversed": actions[:, ::-1],
    }
    return Counterfactuals(actions, actions[similar_clips(last_frames, ways - 1)], altered)


def similar_clips(last_frames: np.ndarray, number: int) -> np.ndarray:
    """Return, for each frame (N, H, W, 3), the indices (N, number) of the most similar other frames."""
    step = max(1, last_frames.shape[1] // 64)
    pixels = last_frames[:, ::step, ::step].reshape(len(last_frames), -1).astype(np.float64) / 255
    squares = np.square(pixels).sum(axis=1)
    distances = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distances, np.inf)
    return distances.argsort(axis=1, kind="stable")[:, :number]


def future_errors(predict: Predict, history: np.ndarray, sequences: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Compute the mean squared errors (K,) of the futures that are predicted for K action sequences.

    Predictions are rounded to 8 bits, so that floating-point noise makes no difference.

    Args:
        predict: The world model.
        history: History frames (h, H, W, 3), uint8.
        sequences: Actions (K, n, A).
        truth: True future (n, H, W, 3), uint8.

    Raises:
        ValueError: If there is not one future per sequence, or they do not have the length and frame size of `truth`.
    """
    futures = _eight_bits(predict(history, sequences))  # (K, n, H, W, 3)
    if futures.shape != (len(sequences), *truth.shape):
        (n, height, width, _), found = truth.shape, futures.transpose(0, 1, 4, 2, 3).shape
        raise ValueError(f"`predict` must return futures ({len(sequences)}, {n}, 3, {height}, {width}), got {found}.")
    return np.array([np.square(future - truth.astype(np.float64) / 255).mean() for future in futures])


def motion(last_frame: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean squared change of the true future (n, H, W, 3) since the last history frame.

    Pixel values are scaled to [0, 1].
    """
    return float(np.square((truth.astype(np.float64) - last_frame) / 255).mean())


def identified(errors: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return whether the correct one of K alternatives has the smallest error; ties share the credit.

    Args:
        errors: Errors (N, K).
        own: Index of the correct alternative of each row (N,).

    Returns:
        Credit (N,) in [0, 1]; 1 / K for a model that ignores its actions.
    """
    smallest = errors == errors.min(axis=1, keepdims=True)
    return smallest[np.arange(len(errors)), own] / smallest.sum(axis=1)


def summarise_faithfulness(errors: np.ndarray, motions: np.ndarray, ways: int, seed: int = 0) -> dict[str, Any]:
    """Summarize the errors of all clips.

    Args:
        errors: Errors (N, K) of the sequences of `Counterfactuals.of_clip`, from `future_errors`.
        motions: Motion in each clip (N,), from `motion`.
        ways: Number of sequences for the identification.
        seed: Seed of the bootstrap.

    Returns:
        `ways`, as given. `identification`: rates; `gap`: decrease of the PSNR in dB for each alteration; both with intervals
        over `all` clips and over each of `STRATA` that contains clips. `verdict`: whether the model follows its actions (None if
        undecided), with a text.
    """
    decibels = -10 * np.log10(np.maximum(errors, ROUNDING))
    credit = identified(errors[:, :ways], np.zeros(len(errors), dtype=int))
    thirds = np.array_split(np.argsort(motions, kind="stable"), len(STRATA))
    groups = {"all": np.arange(len(errors))} | dict(zip(STRATA, thirds, strict=True))

    def figures(values: np.ndarray) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        return {name: bootstrap(values[group], rng) for name, group in groups.items() if len(group)}

    gaps = {name: decibels[:, 0] - decibels[:, ways + number] for number, name in enumerate(ALTERATIONS)}
    summary = {
        "ways": ways,
        "identification": figures(credit),
        "gap": {name: figures(values) for name, values in gaps.items()},
    }
    return summary | {"verdict": verdict(summary)}


def verdict(summary: dict[str, Any]) -> dict[str, Any]:
    """Decide from the clips with much motion whether the model follows its actions.

    The model follows them if three 95 % intervals lie above chance: that of the identification rate above 1 / W, and those of
    the gaps for shuffled and for hold actions above 0. The model does not follow them if none of the three lies above chance.
    Otherwise, or with fewer than `FEWEST` clips with much motion, the verdict is undecided.
    """
    chance, last = 1 / summary["ways"], STRATA[-1]
    rate = summary["identification"].get(last)
    if rate is None or rate["n"] < FEWEST:
        return {"obeys": None, "text": f"Undecided: at least {FEWEST} clips with much motion are required."}
    gaps = {name: summary["gap"][name][last] for name in ("shuffled", "held")}
    signs = [rate["low"] > chance, *(gap["low"] > 0 for gap in gaps.values())]
    obeys = True if all(signs) else None if any(signs) else False
    words = {
        True: "The model follows its actions",
        False: "The model does not follow its actions",
        None: "It is undecided whether the model follows its actions",
    }[obeys]
    text = (
        f"{words}: in clips with much motion, the prediction with the true actions is the closest of {summary['ways']} to the "
        f"truth in {rate['mean']:.0%} of cases [{rate['low']:.0%}, {rate['high']:.0%}] (chance {chance:.0%}). The PSNR decreases "
        f"by {_decibel_text(gaps['shuffled'])} with the actions of another clip and by {_decibel_text(gaps['held'])} with hold "
        "actions."
    )
    return {"obeys": obeys, "text": text}


def action_faithfulness(
    predict: Predict,
    histories: np.ndarray,
    actions: np.ndarray,
    truths: np.ndarray,
    holds: np.ndarray,
    ways: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure whether a world model follows its actions.

    Args:
        predict: The world model.
        histories: History frames of each clip (N, h, H, W, 3), uint8.
        actions: True actions (N, n, A).
        truths: True futures (N, n, H, W, 3), uint8.
        holds: See `counterfactual_actions`.
        ways: See `counterfactual_actions`.
        seed: Seed of the shuffling and the bootstrap.

    Returns:
        See `summarise_faithfulness`.

    Raises:
        ValueError: If `ways` is less than 2 or greater than the number of clips, or the shapes do not match.
    """
    others = counterfactual_actions(histories[:, -1], actions, holds, ways, seed)
    clips = list(enumerate(zip(histories, truths, strict=True)))
    errors = np.stack([future_errors(predict, seen, others.of_clip(number), truth) for number, (seen, truth) in clips])
    motions = np.array([motion(seen[-1], truth) for _, (seen, truth) in clips])
    return summarise_faithfulness(errors, motions, ways, seed)


def sensitivity_maps(predict: Predict, history: np.ndarray, actions: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Measure which action component changes which pixels.

    Args:
        predict: The world model.
        history: History frames of one clip (h, H, W, 3), uint8.
        actions: Actions of the clip (n, A).
        steps: Step of each component (A,) in raw units, which is added to and subtracted from all actions; for example the
            standard deviation.

    Returns:
        Maps (A, H, W) in [0, 0.5]: mean absolute change of a pixel per step, over frames and channels.
    """
    changes = np.diag(steps)[:, None]  # (A, 1, A)
    futures = _eight_bits(predict(history, np.concatenate([actions + changes, actions - changes])))
    up, down = np.split(futures, 2)
    return np.abs(up - down).mean(axis=(1, -1)) / 2


def _eight_bits(futures: torch.Tensor) -> np.ndarray:
    """Round predictions (K, n, 3, H, W) to 256 levels; return (K, n, H, W, 3) in [0, 1], float64."""
    return (futures.float() * 255).round().clamp(0, 255).cpu().numpy().astype(np.float64).transpose(
        0, 1, 3, 4, 2
    ) / 255


def _decibel_text(gap: dict[str, float]) -> str:
    return f"{gap['mean']:.2f} dB [{gap['low']:.2f}, {gap['high']:.2f}]"
