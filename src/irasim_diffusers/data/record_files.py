"""Paths of the files of a dataset, and readers of JSON Lines and Parquet; errors name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..json_files import parse_json, read_text


def path_inside(root: Path, path: str) -> Path:
    """Return the path of a file from a path in the metadata, which is relative to the dataset folder.

    Symbolic links in the folder are followed: the Hub's cache consists of them.

    Raises:
        ValueError: If the path is absolute or leaves the folder.
    """
    if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{path!r} must be a path inside the dataset {str(root)!r}: copy the file into it.")
    return root / path


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Parse a JSON Lines file, one object per line; blank lines are ignored.

    Raises:
        ValueError: If the file is missing or a line is not a JSON object in UTF-8; the message names the file and the line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not `splitlines`: U+2028 may occur in strings
        if line.strip():
            row = parse_json(line, path, number)
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
        metadata = pq.read_metadata(path)
        if max_rows is not None and metadata.num_rows > max_rows:
            raise ValueError(
                f"{str(path)!r} must have at most {max_rows} rows for its episodes, got {metadata.num_rows}."
            )
        missing = set(columns or ()) - set(metadata.schema.to_arrow_schema().names)
        if missing:
            raise ValueError(f"{str(path)!r} has no column {min(missing)!r}.")
        return pq.read_table(path, columns=columns, **options)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        ValueError: If the file is missing or damaged.
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
