"""The interface of an executor: jobs in, (job, outcome) out in the order of completion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, Self, TypeAlias, TypeVar

__all__ = ["ONE_WORKER", "POLL_SECONDS", "Content", "Executor", "JobQueue", "Outcome", "Outcomes", "Workers"]

Job = TypeVar("Job")
Result = TypeVar("Result")
Outcome: TypeAlias = Result | Exception
Outcomes: TypeAlias = Generator[tuple[Job, Result | Exception], None, None]

POLL_SECONDS = 0.2
"""Seconds until an iterator that returned None is asked again for a job: short beside the shortest job."""


@dataclass(frozen=True)
class Workers:
    """Which executor runs the jobs, how many run at a time, and how many threads each has.

    Args:
        jobs: number of jobs at a time; None is one, and with ray as many as the cluster has room for.
        threads: torch threads per job. One is as fast as many for small networks. With ray, the number of processors
            that a job reserves.
        executor: "in-process", "local" or "ray"; None is in-process for one job without a timeout, else local.
        timeout: seconds that an evaluation job may run, tuning included; None is no timeout. Training has no timeout.

    Example:
        >>> Workers(jobs=2).name
        'local'
    """

    jobs: int | None = None
    threads: int = 1
    executor: str | None = None
    timeout: float | None = None

    @property
    def name(self) -> str:
        """Return the name of the executor; if none was given, local for several jobs or a timeout."""
        needs_processes = self.jobs not in (None, 1) or self.timeout is not None
        return self.executor or ("local" if needs_processes else "in-process")

    @property
    def exclusive(self) -> bool:
        """Return whether only one job of this run is running at any time, so that its cost is measured alone."""
        return self.name != "ray" and self.jobs in (None, 1)


ONE_WORKER = Workers()


def _no_timeout(job: object) -> None:
    """Return None: a job may run for any time."""


@dataclass
class JobQueue(Generic[Job]):
    """The jobs of a run.

    Args:
        jobs: asked for the next job if there is room for one; None means that no job can start now, and the executor
            asks again later.
        started: called with a job when it starts.
        timeout: returns the seconds that a job may run, None for no timeout. A job that needs longer is ended; its
            outcome is a `TimeLimitError`.
    """

    jobs: Iterator[Job | None]
    started: Callable[[Job], object]
    timeout: Callable[[Job], float | None] = field(default_factory=lambda: _no_timeout)

    exhausted = False
    """Whether no further job will come."""

    def take(self) -> Job | None:
        """Return the next job; None if no job can start now, or none is left."""
        try:
            return None if self.exhausted else next(self.jobs)
        except StopIteration:
            self.exhausted = True
            return None


class Content(Protocol):
    """The bytes of a file, readable in the process that runs a job."""

    def read_bytes(self) -> bytes:
        """Return the content of the file."""


class Executor(ABC):
    """Runs jobs somewhere. A context manager: entered before the first job; leaving ends the jobs still running."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def run(self, work: Callable[[Job], Result], queue: JobQueue[Job]) -> Outcomes[Job, Result]:
        """Yield each job with its result, or with the exception that it raised, in the order of completion.

        Args:
            work: function of one job. If it runs in another process, it must be importable there, and jobs and
                results are pickled.
            queue: the jobs.

        Returns:
            A generator of (job, outcome); closing it ends the running jobs.
        """

    def share(self, path: Path) -> Content:
        """Return the content of a file in a form that can be part of a job.

        Args:
            path: the file.

        Returns:
            The content, to be read where the job runs.
        """
        return path
