"""Check the metadata of LeRobotDataset folders.

Errors name the entry, the expected value and the actual value.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..actions import DERIVATIONS

NUMBERS = re.compile(r"(float|int|uint)(8|16|32|64)|bool")
"""Types of the features whose components are numbers."""
OWN_ENTRY = "irasim"
"""Entry of the feature `action` in info.json for what LeRobot does not store: derivation, units and camera layout."""
MIN_FPS, MAX_FPS = 1e-3, 100_000
MAX_SECONDS = 1e7
"""Maximum time in a video file, in seconds: about four months."""
PATH_FIELD = re.compile(r"\{(\w+)(?::\d{1,2}d?)?\}")
"""A field of a path in info.json, for example `{file_index:03d}`."""
PATH_FIELDS = {"chunk_index", "file_index", "video_key", "episode_chunk", "episode_index"}


def check_info(info: Mapping[str, Any], path: Path, needed: Sequence[str]) -> None:
    """Check the entries of `meta/info.json` that are read later.

    Args:
        info: The content.
        path: The file, for error messages.
        needed: Entries that must exist.

    Raises:
        ValueError: If an entry is missing or invalid, or no feature contains videos or images.
    """
    for key in needed:
        if info.get(key) is None:
            raise ValueError(
                f"{str(path)!r} has no entry {key!r}: add it, or convert the dataset with the scripts of LeRobot."
            )

    def require(valid: bool, name: str, wanted: str, found: Any) -> None:
        if not valid:
            raise ValueError(f"{str(path)!r}: {name} must be {wanted}, got {_short(found)}.")

    fps, features, splits = info["fps"], info["features"], info.get("splits")
    require(_is_number(fps) and fps > 0, "'fps'", "a positive number", fps)
    require(fps >= MIN_FPS, "'fps'", f"at least {MIN_FPS:g}", fps)
    require(fps <= MAX_FPS, "'fps'", f"at most {MAX_FPS}", fps)
    if "chunks_size" in needed:
        size = info["chunks_size"]
        require(_is_number(size, int) and size > 0, "'chunks_size'", "a positive integer", size)
    for key in ("data_path", "video_path"):
        template = info.get(key)
        require(template is None or isinstance(template, str), repr(key), "a path", template)
        for field in PATH_FIELD.findall(template or ""):
            if field not in PATH_FIELDS:
                raise ValueError(
                    f"{str(path)!r}: the fields of {key!r} must be among {sorted(PATH_FIELDS)}, got {field!r}."
                )
        plain = not any(character in PATH_FIELD.sub("", template or "") for character in "{}\0")
        require(plain, repr(key), "a path with fields such as {file_index:03d}", template)
    require(isinstance(features, dict), "'features'", "an object", features)
    for key, feature in features.items():
        named = isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
        require(named, f"feature {key!r}", "an object with a 'dtype'", feature)
        if NUMBERS.fullmatch(feature["dtype"]):
            shape = feature.get("shape")
            sizes = shape is None or (isinstance(shape, list) and all(_is_number(n, int) and n >= 0 for n in shape))
            require(sizes, f"the 'shape' of feature {key!r}", "a list of non-negative integers", shape)
    if not any(feature["dtype"] in ("video", "image") for feature in features.values()):
        raise ValueError(f"{str(path)!r} has no feature of type 'video' or 'image': use a dataset with a camera.")
    require(splits is None or isinstance(splits, dict), "'splits'", "an object", splits)
    for name, part in (splits or {}).items():
        bounds = isinstance(part, str) and re.fullmatch(r"\d{1,12}:\d{1,12}", part) is not None
        require(bounds, f"the split {name!r}", "two episode indices such as '0:10'", part)
    _check_own_entry(features.get("action", {}).get(OWN_ENTRY, {}), require)


def _check_own_entry(own: Any, require: Any) -> None:
    """Check the entry that `write_lerobot` adds to the feature `action`."""
    place = f"{OWN_ENTRY!r} of the feature 'action'"
    require(isinstance(own, dict), place, "an object", own)
    derivation, units, cameras = (own.get(key) for key in ("action_derivation", "action_units", "cameras"))
    require(derivation in (None, *DERIVATIONS), f"'action_derivation' in {place}", f"one of {DERIVATIONS}", derivation)
    texts = units is None or (isinstance(units, list) and all(isinstance(unit, str | None) for unit in units))
    require(texts, f"'action_units' in {place}", "a list of strings or null", units)
    layout = cameras is None or (
        isinstance(cameras, list)
        and all(isinstance(row, list) and row and all(isinstance(key, str) for key in row) for row in cameras)
    )
    require(layout, f"'cameras' in {place}", "rows of feature names", cameras)


def check_rows(rows: Collection[Mapping[str, Any]], info: Mapping[str, Any], name: str) -> None:
    """Check that a dataset has episodes, and warn if their number differs from info.json.

    Raises:
        ValueError: If there is no episode.
    """
    if not rows:
        raise ValueError(f"{name!r} has no episode in its 'meta' folder.")
    total = info.get("total_episodes", len(rows))
    if total != len(rows):
        warnings.warn(
            f"{name!r} has {len(rows)} episodes in its 'meta' folder, but 'total_episodes' in info.json is {total!r:.60}: some "
            "episodes may be missing.",
            stacklevel=2,
        )


def row_number(row: Mapping[str, Any], name: str) -> int:
    """Return a non-negative integer in a row of `meta/episodes`, such as a length or a file index.

    Raises:
        ValueError: If the entry is missing or invalid.
    """
    value = _entry(row, name)
    if not _is_number(value) or value != int(value) or not 0 <= value < 2**53:
        raise ValueError(
            f"{name!r} in 'meta/episodes' must be a non-negative integer below 2**53, got {_short(value)}."
        )
    return int(value)


def row_length(row: Mapping[str, Any]) -> int:
    """Return the number of frames in a row of `meta/episodes`.

    Raises:
        ValueError: If the entry is missing or invalid, or is 0.
    """
    length = row_number(row, "length")
    if not length:
        raise ValueError("'length' in 'meta/episodes' must be at least 1, got 0: remove the episode.")
    return length


def row_seconds(row: Mapping[str, Any], name: str) -> float:
    """Return a time in a row of `meta/episodes`, in seconds.

    Raises:
        ValueError: If the entry is missing or invalid.
    """
    value = _entry(row, name)
    if not _is_number(value) or not 0 <= value <= MAX_SECONDS:
        raise ValueError(
            f"{name!r} in 'meta/episodes' must be a number of seconds from 0 to {MAX_SECONDS:g}, got {_short(value)}."
        )
    return float(value)


def _entry(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"{name!r} is missing in 'meta/episodes'.")
    return row[name]


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
