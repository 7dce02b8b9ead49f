"""File locks by which several runs into one directory share the work and do nothing twice."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

__all__ = ["FileLocks"]


class FileLocks:
    """Locks on the files of a directory that this run is about to write. A context manager; leaving releases them.

    A lock is one of the operating system on a file under `locks/`, so it ends with its process, however that ends. The
    lock files stay; an empty one means nothing. Each run also holds a lock of its own, by which runs see each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.root = directory, directory / "locks"
        self._own_run = self.root / "runs" / f"{uuid.uuid4().hex}.lock"
        self._locks: dict[Path, FileLock] = {}

    def __enter__(self) -> Self:
        self._lock(self._own_run).acquire(timeout=-1)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._own_run.unlink()
        for lock in self._locks.values():
            lock.release()

    def acquire(self, path: Path) -> bool:
        """Lock a file of the directory; return False if it is locked. Raises OSError, for instance on a full disk."""
        lock = self._lock(self._name(path))
        return not lock.is_locked and _is_acquired(lock)

    def release(self, path: Path) -> None:
        """Release the lock of a file; does nothing if it is not held."""
        self._lock(self._name(path)).release()

    def has_other_runs(self) -> bool:
        """Return whether another run into this directory is alive; removes the files of runs that have ended."""
        others = [path for path in self._own_run.parent.glob("*.lock") if path != self._own_run]
        return any([self._is_alive(path) for path in others])

    def _is_alive(self, run: Path) -> bool:
        lock = self._lock(run)
        if not _is_acquired(lock):
            return True
        run.unlink(missing_ok=True)
        lock.release()
        return False

    def _name(self, path: Path) -> Path:
        name = path.relative_to(self.directory)
        return self.root / name.with_name(f"{name.name}.lock")

    def _lock(self, name: Path) -> FileLock:
        """Return the lock object of a file, kept to the end: a KeyboardInterrupt during its deletion would be lost."""
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
