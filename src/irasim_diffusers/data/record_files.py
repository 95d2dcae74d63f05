"""Read JSON, JSON Lines and Parquet files of datasets; errors contain the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import unique_keys


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: If the file is missing or is not JSON in UTF-8; names the file and the line.
    """
    return _parse(_read_text(path), path, 1)


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that contains an object.

    Raises:
        ValueError: Like `read_json`, or if the content is not an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must contain a JSON object, got {type(content).__name__}.")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Parse a JSON Lines file, one object per line; blank lines are ignored.

    Raises:
        ValueError: If the file is missing or a line is not a JSON object in UTF-8; the message names the file and the line.
    """
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # not `splitlines`: U+2028 may occur in strings
        if line.strip():
            row = _parse(line, path, number)
            if not isinstance(row, dict):
                raise ValueError(f"{str(path)!r}, line {number}: must be a JSON object, got {type(row).__name__}.")
            rows.append(row)
    return rows


def read_parquet(
    path: Path, columns: list[str] | None = None, max_rows: int | None = None, **options: Any
) -> pa.Table:
    """Read a Parquet file.

    Args:
        path: The file.
        columns: Names of the columns; None reads all.
        max_rows: Maximum number of rows, checked before reading, because a small file can contain many equal rows.
        options: Further arguments of `pyarrow.parquet.read_table`.

    Raises:
        ValueError: If the file or a column is missing, or the file is damaged or has too many rows.
    """
    try:
        rows = 0 if max_rows is None else pq.read_metadata(path).num_rows
        if max_rows is not None and rows > max_rows:
            raise ValueError(f"{str(path)!r} must have at most {max_rows} rows for its episodes, got {rows}.")
        return pq.read_table(path, columns=columns, **options)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        ValueError: Like `read_parquet`.
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
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(
            f"{str(path)!r}, line {line}, is not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r}, line {line}, is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{str(path)!r}, line {line}, is not valid JSON: nested too deeply.") from error
