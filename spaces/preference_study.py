"""Human preference study of the videos of several models (paper, appendix 13)."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from irasim_diffusers.metrics import bootstrap

CHOICES = ("left", "similar", "right")
OUTCOMES = ("win", "tie", "loss")


@dataclass(frozen=True)
class Comparison:
    """Two predictions of one clip, shown with the ground truth; raters do not see the model names."""

    clip: str
    left: str  # name of a model
    right: str


@dataclass(frozen=True)
class Answer:
    """A rater's answer to a comparison."""

    rater: str
    clip: str
    left: str
    right: str
    choice: str  # one of CHOICES: the better side


class PreferenceStudy:
    """A preference study that stores each answer on disk immediately.

    Each answer is a line of `answers.jsonl`, flushed to disk when `answer` returns. Several processes may serve one study.

    Args:
        folder: Folder of the answers; an existing study in it is resumed.
        clips: Names of the clips.
        model: Name of the model to rate.
        others: Names of the other models.
        seed: Seed of the order and the sides, which differ between raters.

    Raises:
        ValueError: If there are no clips or other models, or a name is repeated.
    """

    def __init__(
        self, folder: str | os.PathLike, clips: Sequence[str], model: str, others: Sequence[str], seed: int = 0
    ) -> None:
        models = [model, *others]
        if not clips or not others or len(set(models)) < len(models) or len(set(clips)) < len(clips):
            raise ValueError(
                "`clips` and `others` must each contain at least one name, without repetitions, got "
                f"{len(clips)} clips and the models {models}."
            )
        self.clips = tuple(clips)
        self.model = model
        self.others = tuple(others)
        self.seed = seed
        self._file = Path(folder) / "answers.jsonl"
        self._file.parent.mkdir(parents=True, exist_ok=True)

    def comparisons(self, rater: str) -> list[Comparison]:
        """Return a rater's comparisons; the random order and sides are fixed for each rater."""
        digest = hashlib.sha256(json.dumps([self.seed, rater]).encode()).digest()
        rng = np.random.default_rng(list(digest))
        pairs = [(clip, other) for clip in self.clips for other in self.others]
        swapped = rng.random(len(pairs)) < 0.5
        shown = [
            Comparison(clip, other, self.model) if swap else Comparison(clip, self.model, other)
            for (clip, other), swap in zip(pairs, swapped, strict=True)
        ]
        return [shown[index] for index in rng.permutation(len(shown))]

    def remaining(self, rater: str) -> list[Comparison]:
        """Return the comparisons that a rater has not answered yet."""
        answered = {(answer.clip, answer.left, answer.right) for answer in self.answers() if answer.rater == rater}
        shown = self.comparisons(rater)
        return [each for each in shown if (each.clip, each.left, each.right) not in answered]

    def answer(self, rater: str, comparison: Comparison, choice: str) -> None:
        """Store an answer; it replaces an earlier answer to the same comparison.

        Raises:
            ValueError: If the rater has no name, the choice is unknown, or the comparison was not shown to the rater.
        """
        if not rater:
            raise ValueError("`rater` must be a name, got none.")
        if choice not in CHOICES:
            raise ValueError(f"`choice` must be one of {', '.join(CHOICES)}, got {choice!r}.")
        if comparison not in self.comparisons(rater):
            raise ValueError(f"`comparison` must be one of the comparisons for {rater!r}, got {comparison}.")
        answer = Answer(rater, comparison.clip, comparison.left, comparison.right, choice)
        # the first newline ends a line that a crash cut off; a single O_APPEND write does not mix with other writes
        line = f"\n{json.dumps(vars(answer))}\n".encode()
        file = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)

    def answers(self) -> list[Answer]:
        """Return the valid answers: the last one of each rater to each comparison of this study."""
        compared = {frozenset((self.model, other)) for other in self.others}
        latest: dict[tuple[str, str, frozenset[str]], Answer] = {}
        for line in self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else ():
            try:
                answer = Answer(**json.loads(line))
            except (json.JSONDecodeError, TypeError):  # empty, or cut off by a crash
                continue
            pair = frozenset((answer.left, answer.right))
            if answer.clip in self.clips and pair in compared:
                latest[answer.rater, answer.clip, pair] = answer
        return list(latest.values())

    def rates(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        """Compute how often the model wins, ties and loses against each other model.

        Raters of one clip see the same videos, so clips, not answers, are the independent units of the intervals.

        Returns:
            For each other model with answers: `win`, `tie` and `loss`, each the mean over clips with a bootstrap 95 % interval, and
            the numbers of `answers` and `raters`.
        """
        rates: dict[str, dict[str, Any]] = {}
        for other in self.others:
            answers = [answer for answer in self.answers() if other in (answer.left, answer.right)]
            if not answers:
                continue
            outcomes: dict[str, list[str]] = {
                clip: [] for clip in self.clips if any(answer.clip == clip for answer in answers)
            }
            for answer in answers:
                outcomes[answer.clip].append(self._outcome(answer))
            rates[other] = {
                kind: bootstrap(
                    np.array([np.mean([outcome == kind for outcome in of_clip]) for of_clip in outcomes.values()]),
                    np.random.default_rng(seed),
                )
                for kind in OUTCOMES
            } | {"answers": len(answers), "raters": len({answer.rater for answer in answers})}
        return rates

    def export(self, path: str | os.PathLike) -> None:
        """Write the valid answers as CSV, with the outcome of each for the model."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*(field.name for field in fields(Answer)), "outcome"])
            writer.writerows([*vars(answer).values(), self._outcome(answer)] for answer in self.answers())

    def _outcome(self, answer: Answer) -> str:
        if answer.choice == "similar":
            return "tie"
        return "win" if getattr(answer, answer.choice) == self.model else "loss"
