"""Several processes of this machine. A process that crashes loses its own job and no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_process
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, Generic, TypeVar

import torch
from pebble import ProcessExpired, ProcessPool

from bdl_bench.runner.executors.base import POLL_SECONDS, Executor, JobQueue, Outcome, Outcomes, Workers
from bdl_bench.runner.executors.outcomes import outcome_from_bytes, run_job_to_bytes
from bdl_bench.runner.executors.worker_errors import TimeLimitError, WorkerCrashedError, worker_crashed

__all__ = ["Local"]

Job = TypeVar("Job")
Result = TypeVar("Result")
_SECONDS_FOR_EXIT_CODE = 1.0
"""Seconds that the pool has to report the exit code of a process that is gone; it looks every 0.1 s."""
_PRELOAD = ["bdl_bench.runner.warm_up", "bdl_bench.runner.evaluate_job"]
"""Modules that the server imports once, for all processes that it starts."""


class Local(Executor):
    """Runs jobs in new processes; what a job names (a task, a method) must be importable there.

    If a job's process crashes, the job runs once more in a new process, when no other job is running or can start. If
    that process crashes too, the outcome is a `WorkerCrashedError` with the signal. A job that reaches its timeout is
    ended and not repeated.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def run(self, work: Callable[[Job], Result], queue: JobQueue[Job]) -> Outcomes[Job, Result]:
        pool = _Pool(work, self.workers, queue)
        try:
            while pool.assign_jobs():
                for worker in pool.wait():
                    yield from pool.outcomes(worker)
        finally:
            pool.shutdown()


class _Worker(Generic[Job]):
    """One process and its job.

    It is a pool of its own: a process that is killed while it sends a result keeps the locks of its pool.
    """

    def __init__(self, work: Callable[[Job], Any], n_threads: int) -> None:
        self.work = work
        setup = (n_threads, dict(os.environ))
        self.processes = ProcessPool(1, initializer=_set_up, initargs=setup, context=new_processes())
        self.job: Job | None = None
        self.pid: int | None = None
        self.future: Future[Any] = self.processes.schedule(os.getpid)

    def start(self, timeout: float | None) -> None:
        """Run the worker's job. The timeout begins when the process receives it."""
        self.future = self.processes.schedule(run_job_to_bytes, (self.work, self.job), timeout=timeout)

    def has_exited(self) -> bool:
        """Return whether the process ended with exit status 0 during its job, for which the pool waits for ever."""
        if self.pid is None or _is_alive(self.pid):
            return False
        wait([self.future], timeout=_SECONDS_FOR_EXIT_CODE)
        return not self.future.done()

    def shutdown(self) -> None:
        """End the process, also during a job, since it writes nothing that could be lost."""
        self.processes.stop()
        self.processes.join()


class _Pool(Generic[Job]):
    """The workers of one run and the jobs whose process crashed."""

    def __init__(self, work: Callable[[Job], Any], options: Workers, queue: JobQueue[Job]) -> None:
        self.work, self.queue = work, queue
        self.n_threads, self.n_jobs = options.threads, options.jobs or 1
        self.workers: list[_Worker[Job]] = []
        self.to_retry: deque[Job] = deque()
        self.retried: Job | None = None  # runs alone
        self.any_ready = False

    def assign_jobs(self) -> bool:
        """Give a job to every free worker; return False if no job is left."""
        while self.retried is None and self._n_busy < self.n_jobs and (job := self.queue.take()) is not None:
            self._assign(job)
        if self._n_busy == 0 and self.to_retry:
            self.retried = self.to_retry.popleft()
            self.shutdown()
            self._assign(self.retried)
        return self._n_busy > 0 or not self.queue.exhausted

    def wait(self) -> list[_Worker[Job]]:
        """Return the busy workers that became ready, have an outcome or ended, after `POLL_SECONDS` at most."""
        busy = [worker for worker in self.workers if worker.job is not None]
        if not busy:
            time.sleep(POLL_SECONDS)
            return []
        done, _ = wait([worker.future for worker in busy], timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        return [worker for worker in busy if worker.future in done or worker.has_exited()]

    def outcomes(self, worker: _Worker[Job]) -> Iterator[tuple[Job, Outcome[Any]]]:
        """Yield the worker's job with its outcome, if it has one."""
        error: Any = worker.future.exception() if worker.future.done() else ProcessExpired("exited", 0)
        if worker.pid is None and error is None:
            worker.pid, self.any_ready = worker.future.result(), True
            self._start(worker)
            return
        if not self.any_ready:
            raise _cannot_start() from error
        job, worker.job = worker.job, None
        assert job is not None
        if error is None:
            outcome = outcome_from_bytes(worker.future.result())
        else:
            self._discard(worker)
            outcome = self._failure(job, error)
        if outcome is None:
            self.to_retry.append(job)
            return
        self.retried = None
        yield job, outcome

    def _failure(self, job: Job, error: Exception) -> Exception | None:
        """Return the outcome of a job that did not return; None if it runs once more."""
        seconds = self.queue.timeout(job)
        if isinstance(error, TimeoutError) and seconds is not None:
            return TimeLimitError(seconds)
        if not isinstance(error, (ProcessExpired, BrokenProcessPool)):
            return error  # the job cannot be pickled
        return worker_crashed(getattr(error, "exitcode", None)) if job is self.retried else None

    def shutdown(self) -> None:
        """End all processes."""
        while self.workers:
            self._discard(self.workers[-1])

    @property
    def _n_busy(self) -> int:
        return sum(worker.job is not None for worker in self.workers)

    def _assign(self, job: Job) -> None:
        idle = next((worker for worker in self.workers if worker.job is None), None)
        worker = idle or _Worker[Job](self.work, self.n_threads)
        worker.job = job
        if idle is None:
            self.workers.append(worker)
        else:
            self._start(worker)

    def _start(self, worker: _Worker[Job]) -> None:
        assert worker.job is not None
        self.queue.started(worker.job)
        worker.start(self.queue.timeout(worker.job))

    def _discard(self, worker: _Worker[Job]) -> None:
        self.workers.remove(worker)
        worker.shutdown()


def new_processes() -> SpawnContext | ForkServerContext:
    """Return how to start processes: from a server that has only imported modules, so that each is imported once.

    The server has none of the threads, locks and device contexts that make a plain fork unsafe.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _set_up(n_threads: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server may have started before a variable changed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends the process at once, also inside a long call of torch
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(n_threads)


def _exit_with_parent() -> None:
    """End this process if the run is killed, since nothing would receive its results."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_process([parent.sentinel])
    os._exit(1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _cannot_start() -> WorkerCrashedError:
    return WorkerCrashedError(
        "worker processes that start",
        received="one that ended before it began",
        remedy='in a script, call it under `if __name__ == "__main__":`, since each worker imports the script; '
        "or --executor in-process.",
    )
