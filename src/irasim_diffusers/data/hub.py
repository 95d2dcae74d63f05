"""Temporary download of the files of a data set on the Hub."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import psutil
from huggingface_hub import cached_assets_path, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError


@dataclass(eq=False)
class HubFiles:
    """Files of a data set on the Hub that are downloaded on request, one of each kind at a time.

    Every process downloads separately, because processes need a file at different times. The files are stored in the assets cache
    of the Hub and deleted with the process; those of killed processes are deleted by the next one.

    Args:
        repo_id: Name of the data set on the Hub.
        revision: Commit.
    """

    repo_id: str
    revision: str
    _held: dict[str, str] = field(default_factory=dict, init=False)

    def fetch(self, name: str, kind: str) -> Path:
        """Download a file, after deleting the previous one of its kind.

        Args:
            name: Path of the file in the repository.
            kind: Kind of the file, for example its camera.

        Returns:
            The local path.

        Raises:
            ValueError: If the file does not exist.
        """
        place = self._folder / kind
        if self._held.get(kind) != name:
            self._held.pop(kind, None)
            shutil.rmtree(place, ignore_errors=True)
            try:
                hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.revision, local_dir=place)
            except RemoteEntryNotFoundError as error:
                raise ValueError(f"{name!r} does not exist on the Hub at commit {self.revision}.") from error
            self._held[kind] = name
        return place / name

    @cached_property
    def _folder(self) -> Path:
        parent = cached_assets_path("irasim_diffusers", namespace=self.repo_id, subfolder=platform.node())
        for folder in parent.iterdir():
            process = folder.name.split("-")[0]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder
