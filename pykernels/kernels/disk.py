"""Compiled code kept on disk, for the next process that wants the same kernel."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path


class DiskCache:
    """Code on disk, named by the caller after content, processor and versions. A damaged or foreign entry is not used.

    A process that writes keeps the folder under `most_bytes`: what was not read for longest goes.
    """

    def __init__(self, folder: Path | None, most_bytes: int = 1 << 29) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._written = 0

    def read(self, name: str) -> bytes | None:
        """The entry of that name, None if there is none that is whole."""
        if self.folder is None:
            return None
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return None
        stamp, code = content[:_STAMP], content[_STAMP:]
        if stamp != _stamp(name, code):
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder / name)
        return code

    def write(self, name: str, code: bytes) -> None:
        """Store an entry; a reader sees all of it or nothing. What cannot be stored is compiled again another time."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(_stamp(name, code) + code)
            os.replace(temporary, self.folder / name)
            # Looking at all entries is not worth it for every one.
            if self._written % 64 == 0:
                self._prune()
            self._written += 1
        except OSError:
            return

    def _prune(self) -> None:
        assert self.folder is not None
        entries = sorted(
            ((p.stat(), p) for p in self.folder.iterdir()), key=lambda e: e[0].st_mtime, reverse=True
        )
        total = 0
        for status, path in entries:
            total += status.st_size
            if total > self.most_bytes:
                path.unlink(missing_ok=True)


_STAMP = 32


def _stamp(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + code).digest()


def default_folder() -> Path:
    """Where code is cached: `pykernels` in the user's cache folder (XDG)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pykernels"
