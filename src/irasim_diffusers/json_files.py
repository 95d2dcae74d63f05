"""Read JSON files; errors name the file and, for invalid text, the line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """Read the text of a JSON file in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: If the file cannot be read or is not UTF-8; the message names the file, and the line that is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{str(path)!r}, line {line}: the file is not JSON in UTF-8: {error.reason}.") from error


def parse_json(text: str, path: Path, line: int = 1, finite: bool = False) -> Any:
    """Parse the JSON text that starts at a line of a file.

    Args:
        text: The text.
        path: The file, for error messages.
        line: Line number of the start of the text in the file, counted from 1.
        finite: Whether to reject NaN, infinite values, numbers that exceed the range of a float, and integers of more than 300
            digits.

    Raises:
        ValueError: If the text is not JSON or is nested too deeply, a key occurs twice, or `finite` rejects a number. The message
            names the file and the line: the first line of the text for a repeated key, a rejected number or too deep nesting.
    """
    hooks: dict[str, Any] = (
        {"parse_float": _finite, "parse_int": _integer, "parse_constant": _finite} if finite else {}
    )
    try:
        return json.loads(text, object_pairs_hook=unique_keys, **hooks)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(
            f"{str(path)!r}, line {line}, is not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r}, line {line}, is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{str(path)!r}, line {line}, is not valid JSON: nested too deeply.") from error


def read_json(path: Path, finite: bool = False) -> Any:
    """Read a JSON file; see `read_text` and `parse_json` for the errors."""
    return parse_json(read_text(path), path, finite=finite)


def read_json_object(path: Path, finite: bool = False) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        ValueError: If the file cannot be read, is not valid JSON, or does not contain an object.
    """
    content = read_json(path, finite)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must contain a JSON object, got {type(content).__name__}.")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Return the config of a model, which must be a JSON object.

    The result is empty if the file is missing or not valid JSON, which the loaders report.

    Raises:
        ValueError: If the file contains valid JSON that is not an object, which the loaders of diffusers report unclearly.
    """
    try:
        content = read_json(path)
    except ValueError:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{str(path)!r} must contain a JSON object, got {type(content).__name__}: the file is damaged; copy the model again."
        )
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, as `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: If a key occurs twice; JSON parsers disagree on which value counts.
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} occurs more than once in an object")
        content[key] = value
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"numbers must be finite, got {text[:40]}")
    return value


def _integer(text: str) -> int:
    if len(text) > 300:  # near or beyond the largest float, which has 309 digits
        raise ValueError(f"integers must have at most 300 digits, got {len(text)}")
    return int(text)
