"""All jobs in this process, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from bdl_bench.runner.executors.base import POLL_SECONDS, Executor, JobTimeout, Outcome, Workers, no_timeout
from bdl_bench.runner.executors.outcomes import run_job

__all__ = ["InProcess"]

Job = TypeVar("Job")
Result = TypeVar("Result")


class InProcess(Executor):
    """Runs jobs in this process. Nothing is pickled, so a debugger works. A job that kills the process ends the run.

    Args:
        workers: the threads of a job.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def run(
        self,
        work: Callable[[Job], Result],
        jobs: Iterator[Job | None],
        *,
        started: Callable[[Job], None],
        timeout: JobTimeout[Job] = no_timeout,  # noqa: ARG002  nothing here could end a job
    ) -> Generator[tuple[Job, Outcome[Result]], None, None]:
        for job in jobs:
            if job is None:
                time.sleep(POLL_SECONDS)
                continue
            started(job)
            with _threads(self.workers.threads):
                outcome = run_job(work, job)
            yield job, outcome


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
