"""Temporary downloads of the files in a Hub dataset."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from huggingface_hub import cached_assets_path, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError


@dataclass(eq=False)
class HubFiles:
    """Files in a Hub dataset, downloaded on demand; at most one file per kind is kept.

    Every process downloads separately, because processes need a file at different times. The files are stored in the assets cache
    of the Hub, and deleted with this object or when the process ends. The files of a killed process are deleted by the next process
    that downloads from the dataset on the same machine.

    Args:
        repo_id: Name of the dataset on the Hub.
        revision: Commit of the dataset.
    """

    repo_id: str
    revision: str
    _held: dict[tuple[Path, str], str] = field(default_factory=dict, init=False)
    _folders: dict[int, Path] = field(
        default_factory=dict, init=False
    )  # by process ID: a forked process inherits them

    def fetch(self, name: str, kind: str) -> Path:
        """Return a file; if necessary, download it after deleting the previous one of its kind.

        Args:
            name: Path of the file in the repository.
            kind: Kind of the file, for example its camera.

        Returns:
            The local path.

        Raises:
            ValueError: If the file does not exist.
            OSError: If it cannot be downloaded for another reason.
        """
        folder = self._folder()
        place, held = folder / kind, (folder, kind)
        if self._held.get(held) != name:
            self._held.pop(held, None)
            shutil.rmtree(place, ignore_errors=True)
            try:
                hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.revision, local_dir=place)
            except RemoteEntryNotFoundError as error:
                raise ValueError(f"{name!r} does not exist on the Hub at commit {self.revision}.") from error
            self._held[held] = name
        return place / name

    def _folder(self) -> Path:
        """Return the folder of this process; delete the folders of killed processes."""
        if os.getpid() in self._folders:
            return self._folders[os.getpid()]
        parent = cached_assets_path("irasim_diffusers", namespace=self.repo_id, subfolder=platform.node())
        for folder in parent.iterdir():
            process = folder.name.split("-")[0]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        weakref.finalize(self, _remove, folder, os.getpid())
        self._folders[os.getpid()] = folder
        return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a fork inherits the finalizer
        shutil.rmtree(folder, ignore_errors=True)
