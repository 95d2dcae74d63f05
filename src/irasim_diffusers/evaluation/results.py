"""Output folders of evaluations, which can be resumed: their settings and results."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..files import write_text
from ..json_files import read_json_object


def check_new_folder(folder: str | os.PathLike, own: Collection[str]) -> None:
    """Check that an output folder contains only files of an earlier run.

    Args:
        folder: The folder; it need not exist.
        own: Names of files that an interrupted run may have left. Hidden files are ignored.

    Raises:
        ValueError: If the folder contains any other file.
    """
    folder = Path(folder)
    others = [path.name for path in folder.iterdir() if path.name not in own] if folder.is_dir() else []
    foreign = sorted(name for name in others if not name.startswith("."))
    if foreign:
        raise ValueError(
            f"`output` must be a new folder or one of an earlier run, got {str(folder)!r}, which contains {foreign[0]!r}."
        )


def check_result_folder(
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
                f"{name} was {_shown(found.get(name))}, now {_shown(setting[name])}" for name in differing[:3]
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


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value!r:.80}"


def read_result(path: Path, types: dict[str, type]) -> dict[str, Any] | None:
    """Read a result of an earlier run; None if it is missing or damaged, so that it is computed again.

    Args:
        path: JSON file.
        types: Type of each required entry; `float` stands for any number, and `list` for a non-empty list of numbers
            or of such lists.
    """
    try:
        found = read_json_object(path, finite=True)
    except ValueError:
        return None
    return found if has_types(found, types) else None


def has_types(found: dict[str, Any], types: dict[str, type]) -> bool:
    """Return whether a dictionary contains entries of the given types; see `read_result`."""
    return all(name in found and _is_type(found[name], expected) for name, expected in types.items())


def _is_type(value: Any, expected: type) -> bool:
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is list and isinstance(value, list):
        return len(value) > 0 and all(_is_type(each, list if isinstance(each, list) else float) for each in value)
    return isinstance(value, expected)
