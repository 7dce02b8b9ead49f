"""Which job can start next: the first that no other command has locked and that is not done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from bdl_bench.runner.locks import FileLocks

__all__ = ["Schedule"]

Job = TypeVar("Job")


class Schedule(Iterator[Job | None], Generic[Job]):
    """An iterator over jobs, each locked by the file that it will write.

    It yields None while nothing can start: other commands have locked the remaining jobs, or the queue is empty and a
    running job may still add some. A job stays locked until `close`. Jobs may be added until the last one is closed.

    Args:
        locks: the file locks.
        target: returns the file that a job writes.
        prepare: called with a job that has just been locked; returns the job to run, or None if it is done already.
        failed: called with a job that could not be locked or prepared, and the OSError.
        waiting: called once per job that another command has locked.
    """

    def __init__(
        self,
        locks: FileLocks,
        target: Callable[[Job], Path],
        *,
        prepare: Callable[[Job], Job | None],
        failed: Callable[[Job, Exception], None],
        waiting: Callable[[Job], None],
    ) -> None:
        self.locks, self.target = locks, target
        self.prepare, self.failed, self.waiting = prepare, failed, waiting
        self._queue: list[Job] = []
        self._open: set[Path] = set()
        self._waiting: set[Path] = set()

    def add(self, job: Job) -> None:
        """Append a job to the queue."""
        self._queue.append(job)

    def close(self, job: Job) -> None:
        """Release the lock of a job whose result is written."""
        self._open.discard(self.target(job))
        self.locks.release(self.target(job))

    def __next__(self) -> Job | None:
        for job in tuple(self._queue):
            found = self._lock_and_prepare(job)
            if found is not None:
                return found
        if not self._queue and not self._open:
            raise StopIteration
        return None

    def _lock_and_prepare(self, job: Job) -> Job | None:
        """Return the job to run, locked; None if it is locked by another command, done already, or failed."""
        path = self.target(job)
        try:
            if not self.locks.acquire(path):
                self._report_waiting(job, path)
                return None
            found = self.prepare(job)
        except OSError as error:
            found = None
            self.failed(job, error)
        self._queue.remove(job)
        if found is None:
            self.locks.release(path)
            return None
        self._open.add(path)
        return found

    def _report_waiting(self, job: Job, path: Path) -> None:
        if path not in self._waiting:
            self._waiting.add(path)
            self.waiting(job)
