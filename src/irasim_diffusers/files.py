"""Atomic writes: a file or folder is either complete or absent, even after a crash."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\..*\.(?P<pid>\d+)(?:-(?P<host>[0-9a-f]{8})-[0-9a-f]{8})?\.partial(?:\.[^.]+)?")
"""Names of temporary files and folders, with the id of the writing process and (except in early versions) a hash of the machine."""
ABANDONED_AFTER = 24 * 3600
"""Seconds without a change after which the temporary file of another machine counts as abandoned."""
TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Parts of the RuntimeErrors with which versions of `torch.save` hide an OSError."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock an existing folder, so that only one process at a time writes to it.

    The lock also ends if the process is killed. Folders on Windows and on file systems without locks are not protected.

    Raises:
        ValueError: If another process has locked the folder.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{str(folder)!r} is being written by another process: wait until it has finished."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """Raise an OSError that names the file if it cannot be written; some writers do not name it.

    Raises:
        OSError: If the disk is full, or `torch.save` cannot write.
    """
    try:
        yield
    except Exception as error:  # safetensors and PyArrow raise their own types
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        if isinstance(error, RuntimeError) and any(name in str(error) for name in TORCH_SAVE):
            raise OSError(f"cannot write {str(path)!r}: {str(error).splitlines()[0]}") from error
        raise


def file_hash(path: Path) -> str:
    """Return the SHA-256 hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def temporary_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, delete it on an error.

    The file is flushed before it is renamed. The temporary name keeps the suffix, because many writers choose the
    format by it. The name is unique, so that several processes can write to the same path: the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_temporary_name(path.stem)}{path.suffix}")
    try:
        with write_errors_named(path):
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

    Raises:
        ValueError: If `path` is a folder with content when the temporary folder is renamed, such as one that another process has
            written in the meantime.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_temporary_name(path.name))
    partial.mkdir()
    try:
        with write_errors_named(path):
            yield partial
            for written in [*partial.rglob("*"), partial]:
                flush(written)
        try:
            partial.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise ValueError(
                f"{str(path)!r} must be a new or empty folder, but contains files, perhaps of another process: choose a new folder."
            ) from error
        flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a temporary name, then rename it."""
    with temporary_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(flag: str, path: Path, folder: Path) -> None:
    """Raise ValueError if no file can be written in a folder or its nearest existing parent.

    The error names `path`.
    """
    folder = folder.absolute()
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permission bits are not sufficient, for example on /proc
    except OSError as error:
        raise ValueError(
            f"{flag} must be writable, got {str(path)!r}: {error.strerror} in {str(folder)!r}; choose another folder."
        ) from error


def remove_abandoned(folder: str | os.PathLike) -> None:
    """Delete the temporary files and folders of killed processes, and keep those of running ones.

    A process on another machine cannot be checked; its files count as abandoned after a day without a change.
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
