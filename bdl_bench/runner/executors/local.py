"""Several processes of this machine. One that dies takes its own item with it, and no other."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from bdl_bench.runner.executors.base import POLL_SECONDS, Executor, Limit, Outcome, Workers, no_limit
from bdl_bench.runner.executors.retries import outcome_of
from bdl_bench.runner.executors.worker import READY, WorkerProcess
from bdl_bench.runner.executors.worker_errors import TimeLimitError, WorkerDiedError, death_of

__all__ = ["Local"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Local(Executor):
    """Processes that import everything anew; what an item names (a task, a method) must be importable there.

    An item whose process died is tried once more, in a fresh process with nothing beside it, when nothing else can
    start. If that dies too, the outcome is a `WorkerDiedError` with the signal. One that is at work for longer than its
    limit is ended with its process, and not tried again.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def run(
        self,
        work: Callable[[Item], Result],
        items: Iterator[Item | None],
        *,
        started: Callable[[Item], None],
        timeout: Limit[Item] = no_limit,
    ) -> Generator[tuple[Item, Outcome[Result]], None, None]:
        crew = _Crew(lambda: WorkerProcess(work, self.workers.threads), self.workers.jobs or 1, items, started, timeout)
        try:
            while crew.take_on():
                for worker in crew.heard():
                    yield from crew.outcomes(worker)
                for worker in crew.overdue():
                    yield crew.ended(worker)
        finally:
            crew.dismiss()


class _Crew(Generic[Item]):
    """The workers of one run, and the items that ended a process."""

    def __init__(
        self,
        hire: Callable[[], WorkerProcess[Item]],
        jobs: int,
        items: Iterator[Item | None],
        started: Callable[[Item], None],
        timeout: Limit[Item],
    ) -> None:
        self.hire, self.jobs, self.items, self.started, self.timeout = hire, jobs, items, started, timeout
        self.workers: list[WorkerProcess[Item]] = []
        self.died: deque[Item] = deque()
        self.alone: Item | None = None
        self.exhausted, self.has_begun = False, False

    def take_on(self) -> bool:
        """Give every free place an item; False when there is nothing left to do."""
        while self.alone is None and self._n_busy < self.jobs:
            item = self._next()
            if item is None:
                break
            self._assign(item)
        if self._n_busy == 0 and self.died:
            self.alone = self.died.popleft()
            self.dismiss()
            self._assign(self.alone)
        return self._n_busy > 0 or not self.exhausted

    def heard(self) -> list[WorkerProcess[Item]]:
        """The workers that have something to say, after a while at the most where an item may come free meanwhile."""
        if not self.workers:
            time.sleep(POLL_SECONDS)
            return []
        signs = {sign: worker for worker in self.workers for sign in worker.signs}
        ready: list[Any] = wait(list(signs), self._patience())
        return list(dict.fromkeys(signs[sign] for sign in ready))

    def outcomes(self, worker: WorkerProcess[Item]) -> Iterator[tuple[Item, Outcome[Any]]]:
        """What a worker's message means: it is ready for its item, has done it, or is no more."""
        message, item = worker.hear(), worker.item
        if message is None:
            yield from self._death(worker)
        elif message == READY:
            worker.ready = self.has_begun = True
            self._start(worker)
        elif item is not None:
            worker.rest()
            self.alone = None
            yield item, outcome_of(message)

    def overdue(self) -> list[WorkerProcess[Item]]:
        """The workers whose item has used up its time, and that have not said anything meanwhile."""
        now = time.monotonic()
        return [worker for worker in self.workers if now >= worker.deadline and not worker.has_spoken()]

    def ended(self, worker: WorkerProcess[Item]) -> tuple[Item, TimeLimitError]:
        """The item of a worker whose time is up, and its outcome; the process is ended with it."""
        item = worker.item
        assert item is not None
        self.workers.remove(worker)
        worker.dismiss()
        worker.join()
        self.alone = None
        seconds = self.timeout(item)
        assert seconds is not None
        return item, TimeLimitError(seconds)

    def dismiss(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.dismiss()
        for worker in self.workers:
            worker.join()
        self.workers.clear()

    @property
    def _n_busy(self) -> int:
        return sum(worker.item is not None for worker in self.workers)

    def _patience(self) -> float | None:
        """Seconds until something has to be done without a word from a worker: start an item, or end one."""
        could_start_more = not self.exhausted and self.alone is None and self._n_busy < self.jobs
        deadline = min(worker.deadline for worker in self.workers)
        waits = [POLL_SECONDS] if could_start_more else []
        if deadline < math.inf:
            waits.append(max(0.0, deadline - time.monotonic()))
        return min(waits, default=None)

    def _next(self) -> Item | None:
        try:
            return None if self.exhausted else next(self.items)
        except StopIteration:
            self.exhausted = True
            return None

    def _assign(self, item: Item) -> None:
        idle = next((worker for worker in self.workers if worker.item is None), None)
        worker = idle or self.hire()
        worker.item = item
        if idle is None:
            self.workers.append(worker)
        else:
            self._start(worker)

    def _start(self, worker: WorkerProcess[Item]) -> None:
        assert worker.item is not None
        self.started(worker.item)
        worker.send(worker.item, self.timeout(worker.item))

    def _death(self, worker: WorkerProcess[Item]) -> Iterator[tuple[Item, Outcome[Any]]]:
        exit_code, item = worker.exit_code(), worker.item
        self.workers.remove(worker)
        worker.join()
        if not self.has_begun:
            raise _does_not_start(exit_code)
        if item is not None and item is self.alone:
            self.alone = None
            yield item, death_of(exit_code)
        elif item is not None:
            self.died.append(item)


def _does_not_start(exit_code: int | None) -> WorkerDiedError:
    return WorkerDiedError(
        "worker processes that start",
        received=f"one that ended with exit code {exit_code} before it began",
        remedy='in a script, call it under `if __name__ == "__main__":`, since each worker imports the script; '
        "or --executor in-process.",
    )
