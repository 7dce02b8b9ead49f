"""All jobs in this process, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from bdl_bench.runner.executors.base import POLL_SECONDS, Executor, JobQueue, Outcomes, Workers
from bdl_bench.runner.executors.outcomes import run_job

__all__ = ["InProcess"]

Job = TypeVar("Job")
Result = TypeVar("Result")


class InProcess(Executor):
    """Runs jobs in this process. Nothing is pickled, so a debugger works. A job that kills the process ends the run."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def run(self, work: Callable[[Job], Result], queue: JobQueue[Job]) -> Outcomes[Job, Result]:
        for job in queue.jobs:  # without timeouts: nothing here could end a job
            if job is None:
                time.sleep(POLL_SECONDS)
                continue
            queue.started(job)
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
