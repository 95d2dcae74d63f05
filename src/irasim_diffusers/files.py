"""Atomic writes (a file or folder is either complete or absent, also after a crash), and JSON files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

TEMPORARY = re.compile(r"\..*\.(?P<pid>\d+)(?:-(?P<host>[0-9a-f]{8})-[0-9a-f]{8})?\.partial(?:\.[^.]+)?")
"""Pattern of the names of temporary files and folders, with the process and the machine that write them."""
ABANDONED_AFTER = 24 * 3600
"""Seconds without a change after which the temporary file of another machine counts as abandoned."""


def path_inside(root: Path, path: str) -> Path:
    """Return the path of a file from a path in metadata, relative to the folder of the metadata.

    Symbolic links in the folder are followed: the Hub's cache consists of them.

    Raises:
        ValueError: If the path is absolute or leaves the folder.
    """
    if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{path!r} must be a path inside the dataset {str(root)!r}: copy the file into it.")
    return root / path


def file_hash(path: Path) -> str:
    """Return the SHA-256 hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@contextmanager
def temporary_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, delete it on an error.

    The file is flushed before it is renamed. The temporary name keeps the suffix, because many writers choose the
    format by it. It is unique, so that several writers of one path do not disturb each other: the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_temporary_name(path.stem)}{path.suffix}")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder; flush and rename it to `path` on success, delete it on an error.

    `path` must not exist or must be an empty folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_temporary_name(path.name))
    partial.mkdir()
    try:
        yield partial
        for written in [*partial.rglob("*"), partial]:
            flush(written)
        partial.replace(path)
        flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(folder: str | os.PathLike, own: Collection[str]) -> None:
    """Check that an output folder contains only files of an earlier run.

    Args:
        folder: The folder; it need not exist.
        own: Names that an interrupted run may have left. Hidden files are ignored.

    Raises:
        ValueError: If it contains another name.
    """
    folder = Path(folder)
    others = [path.name for path in folder.iterdir() if path.name not in own] if folder.is_dir() else []
    foreign = sorted(name for name in others if not name.startswith("."))
    if foreign:
        raise ValueError(
            f"`output` must be a new folder or one of an earlier run, got {str(folder)!r}, which contains {foreign[0]!r}."
        )


def claim_folder(
    folder: str | os.PathLike, setting: dict[str, Any], results: str, own: Collection[str] = (), write: bool = False
) -> None:
    """Check that an output folder is new or contains results of the same settings.

    Args:
        folder: The folder; it need not exist.
        setting: Everything that determines the results, JSON-serializable.
        results: Name of the subfolder with the results. Without it, the settings of an earlier run are ignored.
        own: Names of other files that a run may have left.
        write: Write the settings to `setting.json`, immediately before the first result. A run that fails earlier then leaves
            nothing behind.

    Raises:
        ValueError: If the folder contains results of other or unknown settings, or files of other programs.
    """
    folder, setting = Path(folder), json.loads(json.dumps(setting))
    path = folder / "setting.json"
    if not path.is_file() and (folder / results).is_dir() and any((folder / results).iterdir()):
        raise ValueError(f"`output` {str(folder)!r} contains results but no setting.json: choose a new folder.")
    if path.is_file() and (folder / results).is_dir():
        try:
            found = read_json_object(path, finite=True)
        except ValueError as error:
            raise ValueError(
                f"`output` {str(folder)!r} cannot be resumed: {str(error).rstrip('.')}; choose a new folder."
            ) from error
        differing = [name for name in setting if found.get(name) != setting[name]]
        if differing:
            changes = ", ".join(
                f"{name} was {found.get(name)!r:.80}, now {setting[name]!r:.80}" for name in differing[:3]
            )
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ValueError(
                f"`output` {str(folder)!r} contains an evaluation with other settings: {changes}{more}: choose a new folder."
            )
        return
    if write:
        write_text(path, json.dumps(setting, indent=2))
    else:
        check_new_folder(folder, {"setting.json", results, *own})


def read_text(path: Path) -> str:
    """Read the text of a JSON file in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: If the file cannot be read or is not UTF-8; the message names the file and the line.
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
        line: Number of the first line of the text in the file, from 1.
        finite: Whether to reject NaN, infinite values and numbers that exceed the range of a float.

    Raises:
        ValueError: If the text is not JSON, or a key occurs twice; the message names the file and the line.
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
        ValueError: As `read_json`, or if the content is not an object.
    """
    content = read_json(path, finite)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must contain a JSON object, got {type(content).__name__}.")
    return content


def read_result(path: Path, kinds: dict[str, type]) -> dict[str, Any] | None:
    """Read a result of an earlier run; None if it is missing or damaged, so that it is computed again.

    Args:
        path: JSON file.
        kinds: Type of each required entry; `float` stands for any number, and `list` for a list of numbers or of lists.
    """
    try:
        found = read_json_object(path, finite=True)
    except ValueError:
        return None
    return found if has_kinds(found, kinds) else None


def has_kinds(found: dict[str, Any], kinds: dict[str, type]) -> bool:
    """Check that a dictionary contains entries of the given types; see `read_result`."""
    return all(name in found and _is_kind(found[name], kind) for name, kind in kinds.items())


def _is_kind(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is list and isinstance(value, list):
        return len(value) > 0 and all(_is_kind(each, list if isinstance(each, list) else float) for each in value)
    return isinstance(value, kind)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"got {text}")
    return value


def _integer(text: str) -> int:
    if len(text) > 300:  # beyond the range of a float
        raise ValueError(f"got an integer of {len(text)} digits")
    return int(text)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a temporary name, then rename it."""
    with temporary_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_abandoned(folder: str | os.PathLike) -> None:
    """Delete the temporary files and folders of killed processes, and keep those of running ones.

    A process of another machine cannot be checked; its files count as abandoned after a day without a change.
    """
    for path in Path(folder).glob(".*.partial*"):
        match = TEMPORARY.fullmatch(path.name)
        if match is None or not _is_abandoned(path, int(match["pid"]), match["host"]):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _temporary_name(stem: str) -> str:
    return f".{stem[:50]}.{os.getpid()}-{_host()}-{secrets.token_hex(4)}.partial"


def _host() -> str:
    """Return a short hash of the name of this machine; process ids are unique per machine only."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _is_abandoned(path: Path, pid: int, host: str | None) -> bool:
    try:
        changed = path.stat().st_mtime
        if host not in (None, _host()):
            return time.time() - changed > ABANDONED_AFTER
        return psutil.Process(pid).create_time() > changed + 60  # the process id was reused
    except psutil.NoSuchProcess:
        return True
    except FileNotFoundError:  # just renamed by its process
        return False
    except psutil.AccessDenied:
        return False


def flush(path: Path) -> None:
    """Write a file or folder to disk, so that a rename never becomes durable before the content."""
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # Windows and some network drives cannot flush folders
            raise
