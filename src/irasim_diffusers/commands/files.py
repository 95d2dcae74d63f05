"""Read and check the values of flags: frames, actions, outputs, names and numbers."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..files import check_writable, remove_abandoned
from ..json_files import unique_keys

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
"""Suffixes of the files that are read as images; others are read as videos."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)
"""Pattern of a number in a CSV file. `float` also accepts underscores and digits of other scripts."""


def read_media(path: Path, flag: str = "--frames") -> np.ndarray:
    """Read the frames of a video file, or an image file as one frame.

    The EXIF orientation of an image is applied; an alpha channel is dropped.

    Args:
        path: The file.
        flag: Flag to name in errors.

    Returns:
        Frames (T, H, W, 3), uint8, RGB.

    Raises:
        ValueError: If the file is missing or unreadable, has gray values of more than 8 bits, or is an animated or too large image.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{flag} must be an image or video file, got {str(path)!r}, which {reason}.")
    from ..data import read_picture, read_video

    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    try:
        return read_picture(path)[None] if is_image else read_video(path)
    except ValueError as error:
        wanted = "image" if is_image else "image or video"
        raise ValueError(f"{flag} must be a readable {wanted}: {error}") from error


def frame_rate(path: Path) -> float | None:
    """Return the frames per second of a video; None for images and videos without a recorded rate."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return None
    import av

    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0) or None


def read_actions(path: Path) -> np.ndarray:
    """Read a table of actions from a .npy, .csv or .json file.

    A .csv file may have a header; a .json file contains a list of rows, or `{"actions": rows}`. Text is read as UTF-8.

    Returns:
        Actions (n, A), float64.

    Raises:
        ValueError: If the file is missing, has another suffix, or does not contain a table of numbers.
    """
    readers = {".npy": _read_npy, ".csv": _read_csv, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    check_name("--actions", path)
    if reader is None:
        raise ValueError(f"--actions must be a .npy, .csv or .json file, got {str(path)!r}.")
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"--actions must be a file, got {str(path)!r}, which {reason}.")
    try:
        actions = reader(path)
    except (ValueError, TypeError, KeyError, OSError, EOFError, OverflowError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"--actions must be a table of numbers, one row per frame, in {str(path)!r}: {error}."
        ) from error
    if actions.ndim != 2:
        raise ValueError(f"--actions must be (n, A), one row per frame, got {actions.shape} in {str(path)!r}.")
    return actions


def _read_npy(path: Path) -> np.ndarray:
    try:
        actions = np.load(path, mmap_mode="r", allow_pickle=False)  # never allocates more than the file contains
    except (SyntaxError, tokenize.TokenError, MemoryError, RecursionError) as error:  # numpy parses headers as Python
        raise ValueError("the header of the file is damaged") from error
    if not isinstance(actions, np.ndarray):
        raise ValueError("the file is an archive of several arrays")
    if actions.dtype.kind not in "iuf":
        raise ValueError(f"its values have the type {actions.dtype}")
    return np.array(actions, dtype=np.float64)


def _read_csv(path: Path) -> np.ndarray:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""))
    lines = [(reader.line_num, row) for row in reader if row]
    rows = [row for _, row in lines]
    if rows and (not any(_is_number(cell) for cell in rows[0]) or _is_numbered_header(rows)):
        lines, rows = lines[1:], rows[1:]
    for number, row in lines:
        for cell in row:
            if not _is_number(cell):
                raise ValueError(f"line {number}: {cell!r} is not a number")
        if len(row) != len(rows[0]):
            raise ValueError(f"line {number} has {len(row)} values, line {lines[0][0]} has {len(rows[0])}")
    return np.array([[float(cell) for cell in row] for row in rows])


def _is_numbered_header(rows: list[list[str]]) -> bool:
    """Check whether the first row is 0, 1, ..., A - 1, as pandas writes for columns without names.

    A single column counts only if no other row is an integer, since its first action may be 0.
    """
    if rows[0] != [str(column) for column in range(len(rows[0]))]:
        return False
    return len(rows[0]) > 1 or not any(row[0].strip().lstrip("+-").isdigit() for row in rows[1:])


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text.strip()) is not None


def _read_json(path: Path) -> np.ndarray:
    content = json.loads(_read_text(path), object_pairs_hook=unique_keys)
    if isinstance(content, dict):
        if "actions" not in content:
            raise ValueError("the object has no entry 'actions'")
        content = content["actions"]
    if not isinstance(content, list) or not all(isinstance(row, list) for row in content):
        raise ValueError(f"the content must be a list of rows, got {_shorten(content)}")
    for number, row in enumerate(content, 1):
        for value in row:
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"row {number}: {_shorten(value)} is not a number")
        if len(row) != len(content[0]):
            raise ValueError(f"row {number} has {len(row)} values, row 1 has {len(content[0])}")
    return np.array(content, dtype=np.float64)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8: save the table as UTF-8") from error


def check_output(path: Path, suffix: str, inputs: Sequence[Path | None] = ()) -> None:
    """Check that a file can be written, and remove the temporary files of killed commands next to it.

    Args:
        path: The file.
        suffix: Required suffix.
        inputs: Files that must not be overwritten.

    Raises:
        ValueError: If `path` is a folder or an input, has another suffix, or is in a folder that cannot be written.
    """
    check_name("--output", path)
    if path.is_dir():
        named = path.suffix.lower() == suffix  # possibly a file next to --output
        remedy = "choose another name" if named else f"pass a file name, such as {str(path / ('out' + suffix))!r}"
        raise ValueError(f"--output must be a file, but {str(path)!r} is a folder: {remedy}.")
    if path.suffix.lower() != suffix:
        raise ValueError(f"--output must end in {suffix}, got {str(path)!r}.")
    if any(given is not None and given.exists() and path.exists() and given.samefile(path) for given in inputs):
        raise ValueError(f"--output must not overwrite the input {str(path)!r}: choose another name.")
    check_writable("--output", path, path.parent)
    remove_abandoned(path.parent)


def check_output_folder(path: Path, flag: str = "--output", empty: bool = False) -> None:
    """Check that a folder can be written, and remove the temporary files of killed commands next to it.

    Args:
        path: The folder; it need not exist.
        flag: Flag to name in errors.
        empty: Whether the folder must be new or empty.

    Raises:
        ValueError: If `path` is a file, cannot be written, or is not empty although `empty` is set.
    """
    check_name(flag, path)
    wanted = "a new or empty folder" if empty else "a folder"
    if path.exists() and (not path.is_dir() or (empty and any(path.iterdir()))):
        raise ValueError(f"{flag} must be {wanted}, got {'' if path.is_dir() else 'the file '}{str(path)!r}.")
    check_writable(flag, path, path)
    remove_abandoned(path.parent)


def check_flag_ranges(arguments: argparse.Namespace, limits: Mapping[str, tuple[int, int | None]]) -> None:
    """Check that integer flags are in range; a flag that is not given is accepted.

    Args:
        arguments: The flags.
        limits: Lowest and highest value by the name of the flag in `arguments`; None for no highest value.

    Raises:
        ValueError: If a value is out of range.
    """
    for name, (least, most) in limits.items():
        value, flag = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}.")
        if value is not None and most is not None and value > most:
            raise ValueError(f"{flag} must be at most {most}, got {value}.")


@contextmanager
def named_flags(**flags: str) -> Iterator[None]:
    """Name flags in errors instead of the arguments of the library.

    Args:
        flags: Flag by name of the argument, such as `start="--start"`.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, flag in flags.items():
            message = message.replace(f"`{name}` ({flag})", flag).replace(f"`{name}`", flag)
        raise ValueError(message) from error


def check_name(flag: str, path: Path | str) -> None:
    """Raise ValueError if a path contains a NUL character, which no file system accepts."""
    if "\0" in str(path):
        raise ValueError(f"{flag} must be a path without NUL characters, got {str(path)!r}.")
