"""Files named on the command line: frames, actions and outputs."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def read_frames(path: Path, flag: str = "--frames") -> np.ndarray:
    """Read the frames of a video, or an image as one frame.

    Args:
        path: The file.
        flag: The flag that names it, for error messages.

    Returns:
        Frames (T, H, W, 3), uint8, RGB.

    Raises:
        ValueError: If the file is missing, unreadable, or not RGB.
    """
    if not path.is_file():
        raise ValueError(f"{flag} must be an image or video file, got {str(path)!r}, which does not exist.")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        from ..data import read_video

        try:
            return read_video(path)
        except ValueError as error:
            raise ValueError(f"{flag} must be a readable image or video: {error}") from error
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{flag} must be a readable image, got {str(path)!r}: {error}.") from error
    if image.mode != "RGB":
        raise ValueError(
            f"{flag} must be an RGB image, got mode {image.mode} in {str(path)!r}: convert it, "
            "`Image.open(path).convert('RGB').save(path)`."
        )
    return np.asarray(image)[None]


def frame_rate(path: Path | None) -> float | None:
    """Return the frames per second of a video file; None for images and for videos that do not record a rate."""
    if path is None or path.suffix.lower() in IMAGE_SUFFIXES:
        return None
    import av

    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0) or None


def read_actions(path: Path) -> np.ndarray:
    """Read a table of actions from a .npy, .csv (with or without a header) or .json file (a list, or `{"actions": list}`).

    Returns:
        Actions (n, A), float64.

    Raises:
        ValueError: If the file is missing, has another suffix, or does not contain a table of numbers.
    """
    readers = {".npy": _read_npy, ".csv": _read_csv, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"--actions must be a .npy, .csv or .json file, got {str(path)!r}.")
    if not path.is_file():
        raise ValueError(f"--actions must be a file, got {str(path)!r}, which does not exist.")
    try:
        actions = np.asarray(reader(path), dtype=np.float64)
    except (ValueError, TypeError, KeyError, EOFError) as error:
        raise ValueError(f"--actions must be a table of numbers, a row a frame, in {str(path)!r}: {error}.") from error
    if actions.ndim != 2:
        raise ValueError(f"--actions must be (n, A), a row a frame, got {actions.shape} in {str(path)!r}.")
    return actions


def _read_npy(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _read_csv(path: Path) -> list[list[float]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
        rows = [row for row in csv.reader(file) if row]
    if rows and (not _is_number(rows[0][0]) or _is_numbered_header(rows)):
        rows = rows[1:]
    return [[float(value) for value in row] for row in rows]


def _is_numbered_header(rows: list[list[str]]) -> bool:
    """Whether the first row is 0, 1, ..., A - 1, the header that pandas writes for columns without names.

    A single column counts only if no other row is an integer, since its first action may be 0.
    """
    if rows[0] != [str(column) for column in range(len(rows[0]))]:
        return False
    return len(rows[0]) > 1 or not any(row[0].strip().lstrip("+-").isdigit() for row in rows[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_json(path: Path) -> list:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    return content["actions"] if isinstance(content, dict) else content


def check_output(path: Path, suffix: str) -> None:
    """Check that a file can be written.

    Raises:
        ValueError: If `path` is a folder, has another suffix, or is in a folder that cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"--output must be a file, got the directory {str(path)!r}: add a file name ending in .mp4.")
    if path.suffix.lower() != suffix:
        raise ValueError(f"--output must end in .mp4, got {str(path)!r}.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()  # some file systems refuse root although the permissions allow it
    except OSError as error:
        raise ValueError(
            f"--output must be writable, got {str(path)!r}: {error.strerror} in {str(folder)!r}; choose another folder."
        ) from error
