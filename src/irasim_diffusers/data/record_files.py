"""Read JSON, JSON Lines and Parquet files of data sets; errors name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: If the file is missing or is not JSON in UTF-8; names the file and the line.
    """
    return _parse(_read_text(path), path, 1)


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        ValueError: As `read_json`, or if the file holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}.")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Parse a JSON Lines file, one object per line; blank lines are ignored.

    Raises:
        ValueError: If the file is missing or a line is not a JSON object in UTF-8; names the file and the line.
    """
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # not `splitlines`: U+2028 may occur in strings
        if line.strip():
            row = _parse(line, path, number)
            if not isinstance(row, dict):
                raise ValueError(f"{str(path)!r}, line {number}: must be a JSON object, got {type(row).__name__}.")
            rows.append(row)
    return rows


def read_parquet(path: Path, columns: list[str] | None = None, **options: Any) -> pa.Table:
    """Read a Parquet file.

    Args:
        path: The file.
        columns: Names of the columns; None reads all.
        options: Further arguments of `pyarrow.parquet.read_table`.

    Raises:
        ValueError: If the file or a column is missing, or the file is damaged; names the file.
    """
    try:
        return pq.read_table(path, columns=columns, **options)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file.

    Raises:
        ValueError: As `read_parquet`.
    """
    try:
        return pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().rstrip(".")
    if "footer" in reason:
        reason += (
            ". The recording was probably stopped before the file was closed: record it again, or remove the file"
        )
    return ValueError(f"cannot read {str(path)!r}: {reason}.")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{str(path)!r}, line {line}: the file is not JSON in UTF-8: {error.reason}.") from error


def _parse(text: str, path: Path, line: int) -> Any:
    """Parse JSON text that starts at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(
            f"{str(path)!r}, line {line}, is not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{str(path)!r}, line {line}, is not valid JSON: nested too deeply.") from error
