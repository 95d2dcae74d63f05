"""Evaluation protocols and the results that the paper reports for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..data import EpisodeSource


@dataclass(frozen=True)
class Protocol:
    """Which frames of a data set are given, and which are predicted and scored.

    Results of different protocols are not comparable.

    Args:
        name: Name of the protocol.
        text: Description for reports.
        history: Frames given, which are never scored.
        predicted: Frames predicted and scored; None for all the rest of the episode, window after window.
        stride: Distance between the starts of clips of an episode; None takes one clip an episode.
        frame_size: Height and width of the frames; None for any.
        as_released: PSNR and SSIM as the script of the IRASim release has them: of grey frames, after both videos went
            through a lossy mp4; and true videos in FVD twice, the second time mirrored.
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
        Protocol("irasim-short", "1 frame given, 15 predicted, clips every 16 frames"),
        Protocol(
            "irasim-short-release",
            "1 frame given, 15 predicted, clips every 16 frames; PSNR and SSIM of grey frames out of mp4 files, as in the "
            "release's script",
            as_released=True,
        ),
        Protocol("irasim-long", "whole episodes from 1 frame, window after window", predicted=None, stride=None),
        Protocol(
            "robonet",
            "2 frames given, 10 predicted, 256x256, clips every 12 frames",
            history=2,
            predicted=10,
            stride=12,
            frame_size=(256, 256),
        ),
    )
}

Table: TypeAlias = dict[str, dict[str, tuple[float, ...]]]
"""Data set -> model -> values."""

_SHORT = ("psnr", "ssim", "latent_l2", "fid", "fvd")
_LONG = ("latent_l2", "psnr")
_SHORT_TABLE: Table = {  # the paper's table 1
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
_ROBONET_TABLE: Table = {  # table 2, SSIM of percents there
    "robonet": {"MaskViT": (20.4, 0.671), "iVideoGPT": (23.8, 0.808), "IRASim": (24.6, 0.811)}
}
_TABLES: dict[str, tuple[tuple[str, ...], Table]] = {
    "irasim-short": (_SHORT, _SHORT_TABLE),
    "irasim-short-release": (_SHORT, _SHORT_TABLE),  # the paper does not say which of the two it used
    "irasim-long": (_LONG, _LONG_TABLE),
    "robonet": (("psnr", "ssim"), _ROBONET_TABLE),
}
PUBLISHED_DATASETS = ("rt1", "bridge", "languagetable", "robonet")


def published_figures(protocol: Protocol, dataset: str) -> dict[str, dict[str, float]]:
    """Return the paper's results as model -> metric -> value.

    Raises:
        ValueError: If the paper reports none for this protocol and data set.
    """
    metrics, table = _TABLES[protocol.name]
    if dataset not in table:
        raise ValueError(
            f"`published` must be one of {sorted(table)} under the protocol {protocol.name}, got {dataset!r}: the paper has "
            "no such figures."
        )
    return {model: dict(zip(metrics, values, strict=True)) for model, values in table[dataset].items()}


@dataclass(frozen=True)
class Clip:
    """A part of an episode, of which the last frames are to be predicted."""

    name: str  # of its files
    episode: int
    start: int  # its first frame in the episode
    history: int  # frames given
    predicted: int  # frames predicted, and their actions


def find_clips(dataset: EpisodeSource, protocol: Protocol, num_clips: int | None = None) -> list[Clip]:
    """The clips of a protocol, in the order of the data set.

    Args:
        dataset: The data set; frames are not decoded.
        protocol: Start and length of the clips.
        num_clips: Take that many, spread evenly; None for all.

    Raises:
        ValueError: If no episode is long enough, or `num_clips` is not positive.
    """
    if num_clips is not None and num_clips < 1:
        raise ValueError(f"`num_clips` must be at least 1, got {num_clips}.")
    clips = []
    for number in range(len(dataset)):
        length = len(dataset.vectors(number)["action"])
        predicted = length - protocol.history if protocol.predicted is None else protocol.predicted
        starts = range(0, length - protocol.history - predicted + 1, protocol.stride or max(length, 1))
        clips += [
            Clip(f"{number:06d}-{start:06d}", number, start, protocol.history, predicted)
            for start in starts
            if predicted > 0
        ]
    if not clips:
        raise ValueError(
            f"no episode of {dataset.name!r} is as long as a clip of {protocol.name}, {protocol.text}: choose another protocol."
        )
    if num_clips is None or num_clips >= len(clips):
        return clips
    return [clips[index] for index in np.linspace(0, len(clips) - 1, num_clips).round().astype(int)]
