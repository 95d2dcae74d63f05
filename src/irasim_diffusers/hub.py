"""Errors of the Hugging Face Hub."""

from __future__ import annotations

import socket
from pathlib import Path

from .json_files import read_config


def missing_reason(name: str, error: BaseException | None) -> str | None:
    """Explain why a model cannot be loaded: it is missing, or a config is not a JSON object; else None."""
    from huggingface_hub import constants, errors

    if Path(name).exists():
        try:
            for path in (Path(name) / "config.json", *Path(name).glob("*/config.json")):
                read_config(path)
        except ValueError as damaged:
            return str(damaged)
        return None
    missing = (errors.HFValidationError, errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError)
    unreachable = (errors.OfflineModeIsEnabled, socket.gaierror, ConnectionError, TimeoutError)
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    if not any(isinstance(cause, (*missing, *unreachable)) for cause in causes):
        return None
    offline = constants.HF_HUB_OFFLINE or any(isinstance(cause, unreachable) for cause in causes)
    place = "in the local cache (the Hub cannot be reached)" if offline else "on the Hub or in the local cache"
    return f"the folder does not exist, and the model is not {place}."
