"""Everything in this process, one item after another."""

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
    """No process is started, nothing is pickled: a debugger and live objects work. What kills this process ends it."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def run(
        self,
        work: Callable[[Job], Result],
        items: Iterator[Job | None],
        *,
        started: Callable[[Job], None],
        timeout: JobTimeout[Job] = no_timeout,  # noqa: ARG002  nothing here could end an item
    ) -> Generator[tuple[Job, Outcome[Result]], None, None]:
        for item in items:
            if item is None:
                time.sleep(POLL_SECONDS)
                continue
            started(item)
            with _threads(self.workers.threads):
                outcome = run_job(work, item)
            yield item, outcome


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
