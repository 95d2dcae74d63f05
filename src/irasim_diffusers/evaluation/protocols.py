"""Evaluation protocols and the results that the paper reports for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..data import EpisodeSource


@dataclass(frozen=True)
class EvaluationProtocol:
    """Rules that determine which frames of a dataset are history, and which are predicted and scored.

    Results of different protocols are not comparable.

    Args:
        name: Name of the protocol.
        text: Description for reports.
        history: Number of history frames, which are never scored.
        predicted: Number of predicted frames; None for the rest of the episode, predicted chunk by chunk.
        stride: Number of frames between the starts of clips in an episode; None for one clip per episode.
        frame_size: Height and width of the frames; None for any size.
        as_released: Compute PSNR and SSIM of frames like the script of the IRASim release: in gray, after a lossy mp4
            compression of both videos; the PSNR of a clip is not affected. FVD then includes each true video twice, the second
            time mirrored.
    """

    name: str
    text: str
    history: int = 1
    predicted: int | None = 15
    stride: int | None = 16
    frame_size: tuple[int, int] | None = None
    as_released: bool = False


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        EvaluationProtocol("irasim-short", "1 history frame, 15 predicted frames, a clip every 16 frames"),
        EvaluationProtocol(
            "irasim-short-release",
            "1 history frame, 15 predicted frames, a clip every 16 frames; PSNR and SSIM of frames in gray after mp4 compression, "
            "as in the script of the release",
            as_released=True,
        ),
        EvaluationProtocol(
            "irasim-long", "whole episodes from 1 history frame, chunk by chunk", predicted=None, stride=None
        ),
        EvaluationProtocol(
            "robonet",
            "2 history frames, 10 predicted frames, 256x256 pixels, a clip every 12 frames",
            history=2,
            predicted=10,
            stride=12,
            frame_size=(256, 256),
        ),
    )
}

Table: TypeAlias = dict[str, dict[str, tuple[float, ...]]]
"""Values by dataset and model."""

_SHORT = ("psnr", "ssim", "latent_l2", "fid", "fvd")
_LONG = ("latent_l2", "psnr")
_SHORT_TABLE: Table = {  # table 1 of the paper
    "rt1": {
        "VDM": (13.762, 0.554, 0.4983, 41.23, 371.13),
        "LVDM": (25.041, 0.815, 0.2244, 4.26, 30.72),
        "IRASim Video-Ada": (25.446, 0.823, 0.2191, 4.34, 29.27),
        "IRASim Frame-Ada": (26.048, 0.833, 0.2099, 5.60, 25.58),
    },
    "bridge": {
        "VDM": (18.520, 0.741, 0.3709, 39.82, 127.25),
        "LVDM": (23.546, 0.810, 0.2155, 10.59, 35.06),
        "IRASim Video-Ada": (24.733, 0.827, 0.2021, 10.30, 23.03),
        "IRASim Frame-Ada": (25.275, 0.833, 0.1947, 10.51, 20.91),
    },
    "languagetable": {
        "VDM": (23.067, 0.857, 0.3204, 64.63, 136.56),
        "LVDM": (28.254, 0.889, 0.1704, 6.85, 24.34),
        "IRASim Video-Ada": (23.893, 0.859, 0.2028, 7.05, 73.84),
        "IRASim Frame-Ada": (28.818, 0.888, 0.1660, 6.38, 48.49),
    },
}
_LONG_TABLE: Table = {  # table 3
    "rt1": {
        "LVDM": (0.2567, 23.573),
        "IRASim Video-Ada": (0.2519, 23.984),
        "IRASim Frame-Ada": (0.2408, 24.615),
    },
    "bridge": {
        "LVDM": (0.2534, 21.792),
        "IRASim Video-Ada": (0.2385, 22.868),
        "IRASim Frame-Ada": (0.2306, 23.260),
    },
    "languagetable": {
        "LVDM": (0.1776, 26.215),
        "IRASim Video-Ada": (0.2112, 22.551),
        "IRASim Frame-Ada": (0.1730, 26.773),
    },
}
_ROBONET_TABLE: Table = {  # table 2, which reports SSIM in percent
    "robonet": {"MaskViT": (20.4, 0.671), "iVideoGPT": (23.8, 0.808), "IRASim": (24.6, 0.811)}
}
_TABLES: dict[str, tuple[tuple[str, ...], Table]] = {
    "irasim-short": (_SHORT, _SHORT_TABLE),
    "irasim-short-release": (_SHORT, _SHORT_TABLE),  # the paper does not state which variant it uses
    "irasim-long": (_LONG, _LONG_TABLE),
    "robonet": (("psnr", "ssim"), _ROBONET_TABLE),
}
PUBLISHED_DATASETS = ("rt1", "bridge", "languagetable", "robonet")


def published_figures(protocol: EvaluationProtocol, dataset: str) -> dict[str, dict[str, float]]:
    """Return the paper's results as model -> metric -> value.

    Raises:
        ValueError: If the paper reports no results for this protocol and dataset.
    """
    metrics, table = _TABLES.get(protocol.name, ((), {}))
    if dataset not in table:
        wanted = f"one of {sorted(table)}" if table else "omitted"
        raise ValueError(
            f"`published` must be {wanted} for the protocol {protocol.name}, got {dataset!r}: the paper reports no such "
            "results."
        )
    return {model: dict(zip(metrics, values, strict=True)) for model, values in table[dataset].items()}


@dataclass(frozen=True)
class Clip:
    """A part of an episode that starts with history frames; the other frames are predicted."""

    name: str  # name of its files, without suffix
    episode: int
    start: int  # first frame in the episode
    history: int  # number of history frames
    predicted: int  # number of predicted frames, and of their actions


def find_clips(
    dataset: EpisodeSource,
    protocol: EvaluationProtocol,
    num_clips: int | None = None,
    broken: dict[int, str] | None = None,
) -> list[Clip]:
    """Find the clips of a protocol, in the order of the dataset.

    Args:
        dataset: The dataset; frames are not decoded.
        protocol: Protocol that determines the starts and lengths of the clips.
        num_clips: Maximum number of clips, evenly spaced; None for all.
        broken: Empty dictionary to which the errors of unreadable episodes are added by index; these episodes are skipped.
            None to raise the errors instead.

    Raises:
        ValueError: If no readable episode is long enough, `num_clips` is not positive, or `broken` is None and an episode cannot
            be read.
    """
    if num_clips is not None and num_clips < 1:
        raise ValueError(f"`num_clips` must be at least 1, got {num_clips}.")
    clips = []
    for number in range(len(dataset)):
        try:
            length = len(dataset.vectors(number)["action"])
        except ValueError as error:
            if broken is None:
                raise
            broken[number] = str(error)
            continue
        predicted = length - protocol.history if protocol.predicted is None else protocol.predicted
        starts = range(0, length - protocol.history - predicted + 1, protocol.stride or max(length, 1))
        clips += [
            Clip(f"{number:06d}-{start:06d}", number, start, protocol.history, predicted)
            for start in starts
            if predicted > 0
        ]
    if broken and len(broken) == len(dataset):
        raise ValueError(f"no episode of {dataset.name!r} can be read: {next(iter(broken.values()))}")
    if not clips:
        skipped = f", and {len(broken)} episodes cannot be read" if broken else ""
        raise ValueError(
            f"no episode of {dataset.name!r} is as long as a clip of {protocol.name} ({protocol.text}){skipped}: use longer "
            "episodes or another protocol."
        )
    if num_clips is None or num_clips >= len(clips):
        return clips
    return [clips[index] for index in np.linspace(0, len(clips) - 1, num_clips).round().astype(int)]
