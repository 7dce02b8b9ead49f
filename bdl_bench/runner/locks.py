"""Who is at what: locks by which several runs into one directory share the work and do nothing twice."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

__all__ = ["FileLocks"]


class FileLocks:
    """The files of a directory that this run is about to write; nobody else may, until they are released.

    A claim is a lock of the operating system on a file under `locks/`, and so ends with its process, however that
    ends. The lock files stay; an empty one means nothing. Each run also holds a lock of its own, by which runs see
    each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.root = directory, directory / "locks"
        self._mark = self.root / "runs" / f"{uuid.uuid4().hex}.lock"
        self._locks: dict[Path, FileLock] = {}

    def __enter__(self) -> Self:
        self._lock(self._mark).acquire(timeout=-1)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._mark.unlink()
        for lock in self._locks.values():
            lock.release()

    def take(self, path: Path) -> bool:
        """Claim a file of the directory; False where it is claimed. Errors: OSError, on a full disk for one."""
        lock = self._lock(self._name(path))
        return not lock.is_locked and _is_acquired(lock)

    def release(self, path: Path) -> None:
        """Let others have it; nothing happens where it is not held."""
        self._lock(self._name(path)).release()

    def others(self) -> bool:
        """Whether another run into this directory is alive; the marks of dead ones are removed."""
        marks = [mark for mark in self._mark.parent.glob("*.lock") if mark != self._mark]
        return any([self._is_alive(mark) for mark in marks])

    def _is_alive(self, mark: Path) -> bool:
        lock = self._lock(mark)
        if not _is_acquired(lock):
            return True
        mark.unlink(missing_ok=True)
        lock.release()
        return False

    def _name(self, path: Path) -> Path:
        name = path.relative_to(self.directory)
        return self.root / name.with_name(f"{name.name}.lock")

    def _lock(self, name: Path) -> FileLock:
        """One object a file, kept to the end: an interruption that comes while one is deleted would be lost."""
        if name not in self._locks:
            name.parent.mkdir(parents=True, exist_ok=True)
            self._locks[name] = FileLock(name, timeout=0, thread_local=False)
        return self._locks[name]


def _is_acquired(lock: FileLock) -> bool:
    try:
        lock.acquire()
    except Timeout:
        return False
    return True
