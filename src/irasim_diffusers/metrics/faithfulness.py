"""Does a world model obey its actions? Measured on recorded clips, without a simulator.

Of one history the model predicts the future under the true actions, under those of clips that begin alike, and under
altered ones. A model that obeys comes nearest the truth under the true actions, and loses under any others; one that
ignores them predicts the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .intervals import bootstrap

Predict = Callable[[np.ndarray, np.ndarray], torch.Tensor]
"""`IRASimPipeline.predict`: one history (h, H, W, 3), uint8, and actions (K, n, A) to futures (K, n, 3, H, W) in [0, 1]; the K
futures must start from the same noise, so that nothing but the actions tells them apart."""

ALTERATIONS = ("shuffled", "held", "reversed")
STRATA = ("little motion", "some motion", "much motion")
"""Thirds of the clips by how much the truth moves. Where hardly anything moves, little can be told."""
FEWEST = 8  # minimum number of clips per third for a verdict
ROUNDING = (1 / 255) ** 2 / 12  # error of pictures of 8 bits; differences below it are none


@dataclass(frozen=True)
class Counterfactuals:
    """The action sequences under which the future of each clip is predicted."""

    true: np.ndarray  # (N, n, A)
    matched: np.ndarray  # (N, W - 1, n, A), of the clips that begin most alike
    altered: dict[str, np.ndarray]  # each of ALTERATIONS -> (N, n, A)

    def of_clip(self, number: int) -> np.ndarray:
        """All sequences (K, n, A) of one clip, K = W + 3: the true one first, then matched, then altered."""
        altered = [self.altered[name][number] for name in ALTERATIONS]
        return np.stack([self.true[number], *self.matched[number], *altered])


def counterfactual_actions(
    last_frames: np.ndarray, actions: np.ndarray, holds: np.ndarray, ways: int = 4, seed: int = 0
) -> Counterfactuals:
    """Choose the other actions of each clip.

    Args:
        last_frames: The last frame seen of each clip (N, H, W, 3).
        actions: True actions (N, n, A).
        holds: For each clip the action (N, A) that asks for no motion; see `actions.hold_action`.
        ways: Sequences W that identification chooses from, the true one included.
        seed: Of the shuffling, in which every clip takes the actions of another.

    Raises:
        ValueError: If there are fewer clips than ways, or shapes do not agree.
    """
    if not 2 <= ways <= len(actions):
        raise ValueError(f"`ways` must be in [2, {len(actions)}], the number of clips, got {ways}.")
    if len(last_frames) != len(actions) or holds.shape != (len(actions), actions.shape[-1]):
        raise ValueError(
            f"`last_frames`, `actions` and `holds` must be of the same clips, got {last_frames.shape}, {actions.shape} and "
            f"{holds.shape}."
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
    """Of each of N frames (N, H, W, 3) the `number` others that are nearest in pixels, (N, number), nearest first."""
    step = max(1, last_frames.shape[1] // 64)
    pixels = last_frames[:, ::step, ::step].reshape(len(last_frames), -1).astype(np.float64) / 255
    squares = np.square(pixels).sum(axis=1)
    distances = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distances, np.inf)
    return distances.argsort(axis=1, kind="stable")[:, :number]


def future_errors(predict: Predict, history: np.ndarray, sequences: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error (K,) of the futures under action sequences (K, n, A) against the truth.

    Predictions are rounded to 8 bits, so that the noise of floating point tells no two apart.

    Args:
        predict: The world model.
        history: Frames seen (h, H, W, 3), uint8.
        sequences: Actions (K, n, A).
        truth: True future (n, H, W, 3), uint8.
    """
    futures = _eight_bits(predict(history, sequences))  # (K, n, H, W, 3)
    if futures.shape[1:] != truth.shape:
        raise ValueError(f"`predict` must give futures (K, {', '.join(map(str, truth.shape))}), got {futures.shape}.")
    return np.array([np.square(future - truth.astype(np.float64) / 255).mean() for future in futures])


def motion(last_frame: np.ndarray, truth: np.ndarray) -> float:
    """How much moves: mean squared change of the true future (n, H, W, 3) since the last frame seen, of [0, 1]."""
    return float(np.square((truth.astype(np.float64) - last_frame) / 255).mean())


def identified(errors: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Whether the own one of K alternatives has the smallest error; those that share it share the credit.

    Args:
        errors: Errors (N, K).
        own: Number of the own alternative of each row (N,).

    Returns:
        Credit (N,) in [0, 1]; of a model that ignores its actions 1 / K.
    """
    smallest = errors == errors.min(axis=1, keepdims=True)
    return smallest[np.arange(len(errors)), own] / smallest.sum(axis=1)


def summarise_faithfulness(errors: np.ndarray, motions: np.ndarray, ways: int, seed: int = 0) -> dict[str, Any]:
    """Summarise the errors of all clips.

    Args:
        errors: Errors (N, K) of the sequences of `Counterfactuals.of_clip`, from `future_errors`.
        motions: How much moves in each clip (N,), from `motion`.
        ways: Sequences of the identification.
        seed: Seed of the bootstrap.

    Returns:
        `identification`: rates, and `gap`: for each alteration the PSNR lost by it in dB; each with intervals over `all`
        clips and in each of `STRATA`. `verdict`: whether the model obeys (None where it cannot be told), and why.
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
    """Decide whether the model follows its actions, from the clips with much motion.

    It does if identification is above chance, and the actions of other clips and holding still both cost PSNR; it does not
    if neither identification nor those gaps are above what they would be by chance. All by their 95 % intervals.
    """
    chance, last = 1 / summary["ways"], STRATA[-1]
    rate = summary["identification"].get(last)
    if rate is None or rate["n"] < FEWEST:
        return {"obeys": None, "text": f"Too few clips to tell: {FEWEST} with much motion are wanted."}
    gaps = {name: summary["gap"][name][last] for name in ("shuffled", "held")}
    signs = [rate["low"] > chance, *(gap["low"] > 0 for gap in gaps.values())]
    obeys = True if all(signs) else None if any(signs) else False
    words = {
        True: "The model obeys its actions",
        False: "The model does not obey its actions",
        None: "It cannot be told whether the model obeys its actions",
    }[obeys]
    text = (
        f"{words}: where most moves, the prediction under the true actions is the nearest of {summary['ways']} to the truth in "
        f"{rate['mean']:.0%} of clips [{rate['low']:.0%}, {rate['high']:.0%}] (chance {chance:.0%}); the actions of another "
        f"clip cost {_decibel_text(gaps['shuffled'])}, holding still {_decibel_text(gaps['held'])}."
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
    """Measure whether a world model obeys its actions.

    Args:
        predict: `IRASimPipeline.predict` of the model.
        histories: Frames seen of each clip (N, h, H, W, 3), uint8.
        actions: True actions (N, n, A).
        truths: True futures (N, n, H, W, 3), uint8.
        holds: See `counterfactual_actions`.
        ways: See `counterfactual_actions`.
        seed: Seed of shuffling and bootstrap.

    Returns:
        See `summarise_faithfulness`.
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
        history: Frames seen of one clip (h, H, W, 3), uint8.
        actions: Its actions (n, A).
        steps: By how much each component is changed, up and down, in all actions (A,), in its own units: its standard
            deviation, for example.

    Returns:
        Maps (A, H, W): mean change of a pixel by one step, of [0, 1], over frames and colours.
    """
    changes = np.diag(steps)[:, None]  # (A, 1, A)
    futures = _eight_bits(predict(history, np.concatenate([actions + changes, actions - changes])))
    up, down = np.split(futures, 2)
    return np.abs(up - down).mean(axis=(1, -1)) / 2


def _eight_bits(futures: torch.Tensor) -> np.ndarray:
    """Predictions (K, n, 3, H, W) as (K, n, H, W, 3) in [0, 1], float64, of 256 values."""
    return (futures.float() * 255).round().clamp(0, 255).cpu().numpy().astype(np.float64).transpose(
        0, 1, 3, 4, 2
    ) / 255


def _decibel_text(gap: dict[str, float]) -> str:
    return f"{gap['mean']:.2f} dB [{gap['low']:.2f}, {gap['high']:.2f}]"
