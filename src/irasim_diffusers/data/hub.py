"""Files of a data set on the Hub that is larger than this disk."""

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
    """Files of a data set on the Hub, downloaded when they are asked for, one of each kind at a time.

    Every process downloads for itself, since another may be done with a file that this one still reads. The files lie in
    the Hub's cache of assets and go with the process; those of one that was killed go when the next begins.

    Args:
        repo_id: The data set's name on the Hub.
        revision: Its commit.
    """

    repo_id: str
    revision: str
    _held: dict[str, str] = field(default_factory=dict, init=False)

    def fetch(self, name: str, kind: str) -> Path:
        """A file, downloaded; the one of its kind that was fetched before is deleted first.

        Raises:
            ValueError: If the data set has no such file.
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
            if not psutil.pid_exists(int(folder.name.split("-")[0])):
                shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder
