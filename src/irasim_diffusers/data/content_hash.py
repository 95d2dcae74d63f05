"""Hashes of datasets and weights; only a part of each media file is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..files import file_hash

ENDS = 1 << 16
"""Number of bytes that are hashed at the start and at the end of a media file."""


def content_hash(root: Path, files: Iterable[Path]) -> str:
    """Hash the names and the content of files.

    JSON and Parquet files are hashed completely, except for embedded images. Other files are represented by `media_stamp`, and
    files in the Hub's cache by the name of their blob.

    Args:
        root: The folder to which names are relative, so that a moved dataset keeps its hash.
        files: The files; missing files are hashed as None.
    """
    entries = [(os.path.relpath(path, root), _file_hash(path)) for path in sorted(set(files))]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def media_stamp(path: str | os.PathLike, modified: bool = True) -> list[Any] | None:
    """Return size, mtime and a hash of the first and last 64 KiB of a file, or None if it cannot be read.

    For a file in the cache of the Hub, return the name of its blob, which is a hash of its content.

    Args:
        path: The file.
        modified: Whether to include the modification time.
    """
    try:
        blob = _hub_blob(Path(path))
        if blob is not None:
            return [blob]
        if not os.path.isfile(path):  # a pipe would block, a device has no end
            return None
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            ends = hashlib.sha256(file.read(ENDS))
            if status.st_size > ENDS:
                file.seek(max(status.st_size - ENDS, ENDS))
                ends.update(file.read(ENDS))
    except (OSError, ValueError):  # errors are reported when the episode is read
        return None
    return [status.st_size, *([status.st_mtime_ns] if modified else []), ends.hexdigest()]


def table_hash(table: pa.Table) -> str:
    """Hash the rows of an Arrow table."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def tensors_hash(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> str:
    """Hash the names and the content of tensors, independent of their order and memory layout.

    Args:
        tensors: Tensors by name.
        dtype: Type to which tensors are converted first; None for their own type.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        values = tensors[name].detach().to("cpu", dtype).contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hub_blob(path: Path) -> str | None:
    """Return the name of the blob that a link in the Hub's cache points to; None for another file."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and path.is_symlink() else None


def _file_hash(path: Path) -> Any:
    blob = _hub_blob(path)
    if blob is not None:
        return blob
    if path.suffix == ".parquet":
        return _parquet_hash(path)
    return _whole_hash(path) if path.suffix in (".json", ".jsonl") else media_stamp(path)


def _whole_hash(path: Path) -> str | None:
    try:
        return file_hash(path)
    except OSError:  # errors are reported when the file is read
        return None


def _parquet_hash(path: Path) -> Any:
    """Hash a Parquet file or, if it embeds images, its other columns and its `media_stamp`.

    Embedded images may be as large as videos.
    """
    try:
        schema = pq.read_schema(path)
        columns = [field.name for field in schema if "binary" not in str(field.type)]
        if len(columns) == len(schema):
            return _whole_hash(path)
        return [table_hash(pq.read_table(path, columns=columns)), media_stamp(path)]
    except (OSError, pa.ArrowException):  # errors are reported when the episode is read
        return _whole_hash(path)
