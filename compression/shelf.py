"""Where finished parts of a run outlive it, so that a later attempt takes them instead of making them again.

The library only says what belongs together (``fingerprint``), what is finished, and asks what there is. Whoever runs it
decides where that is kept: the service in its store, a test in a folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

Files = Mapping[str, Path]
"""The files of one finished part: where the copy at hand lies, by file name."""


class Shelf(Protocol):
    """Keeps finished parts under a fingerprint: what the result depends on, hashed."""

    folder: Path
    """For files that are made to be kept and belong to nothing else; goes with the run."""

    def find(self, fingerprint: str) -> Mapping[str, Files]:
        """Return the finished parts of earlier attempts, by name."""
        ...

    def keep(self, fingerprint: str, name: str, files: Files) -> None:
        """Have a finished part kept; returns at once, and its files must stay as they are until the run ends."""
        ...


class FolderShelf:
    """A shelf in a folder, ``<root>/<fingerprint>/<name>/<file>``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = root / "made"
        self.folder.mkdir(parents=True, exist_ok=True)

    def find(self, fingerprint: str) -> Mapping[str, Files]:
        """Return the finished parts of earlier attempts, by name."""
        parts = sorted((self._root / fingerprint).glob("*"))
        return {part.name: {file.name: file for file in part.iterdir()} for part in parts if not part.name.startswith(".")}

    def keep(self, fingerprint: str, name: str, files: Files) -> None:
        """Copy a finished part; it appears whole or not at all."""
        place = self._root / fingerprint / name
        fresh = place.with_name(f".{name}")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for file, path in files.items():
            shutil.copyfile(path, fresh / file)
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)
