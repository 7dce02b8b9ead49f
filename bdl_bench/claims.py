"""Who is at what: locks by which several runs into one directory share the work and do nothing twice."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

__all__ = ["Claims"]


class Claims:
    """The files of a directory that this run is about to write; nobody else may, until they are released.

    A claim is a lock of the operating system on a file under `locks/`, and so ends with its process, however that
    ends. The lock files stay; an empty one means nothing. Each run also holds a lock of its own, by which runs see
    each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.root = directory, directory / "locks"
        self._held: dict[Path, FileLock] = {}
        self._run = FileLock(self.root / "runs" / f"{uuid.uuid4().hex}.lock", thread_local=False)

    def __enter__(self) -> Self:
        Path(self._run.lock_file).parent.mkdir(parents=True, exist_ok=True)
        self._run.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        for path in list(self._held):
            self.release(path)
        with contextlib.suppress(OSError):
            os.unlink(self._run.lock_file)
        self._run.release()

    def take(self, path: Path) -> bool:
        """Claim a file of the directory; False where another run has it. Errors: OSError, on a full disk for one."""
        if path in self._held:
            return False
        name = path.relative_to(self.directory)
        lock = FileLock(self.root / name.with_name(f"{name.name}.lock"), timeout=0, thread_local=False)
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held[path] = lock
        return True

    def release(self, path: Path) -> None:
        """Let others have it; nothing happens where it is not held."""
        lock = self._held.pop(path, None)
        if lock is not None:
            lock.release()

    def others(self) -> bool:
        """Whether another run into this directory is alive; the marks of dead ones are removed."""
        marks = [p for p in (self.root / "runs").glob("*.lock") if p != Path(self._run.lock_file)]
        return any([not _is_stale(mark) for mark in marks])


def _is_stale(mark: Path) -> bool:
    lock = FileLock(mark, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return False
    mark.unlink(missing_ok=True)
    lock.release()
    return True
