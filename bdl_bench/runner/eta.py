"""The state of a grid from its progress events: which jobs run, which have ended, and the estimated time left."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import fmean

from bdl_bench.runner.events import ENDINGS, Event, JobId

__all__ = ["TimeEstimate"]


class TimeEstimate:
    """Counts of jobs and the estimated time left (ETA).

    A job is expected to take the mean time of the same method on the same task; if none of these has run, the mean
    time of all jobs. Time left = the expected time of all remaining jobs, divided by the largest number that have run
    at the same time, and at least the expected rest of the longest running job.
    """

    def __init__(self, n_jobs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.n_jobs, self.clock = n_jobs, clock
        self.start = clock()
        self.remaining: dict[JobId, None] = {}
        self.running: dict[JobId, float] = {}
        self.counts: Counter[str] = Counter()
        self._seconds: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
        self._max_running = 1

    def update(self, event: Event) -> None:
        """Take an event into account."""
        if event.status == "planned":
            self.remaining[event.job] = None
        elif event.status == "started":
            self.running[event.job] = self.clock()
            self._max_running = max(self._max_running, len(self.running))
        elif event.status in ENDINGS:
            self.counts[event.status] += 1
            self.remaining.pop(event.job, None)
            start = self.running.pop(event.job, None)
            if start is not None:
                self._seconds[event.task, event.method].append(self.clock() - start)

    @property
    def n_ended(self) -> int:
        """Return the number of jobs that have ended, with any status."""
        return sum(self.counts.values())

    def elapsed(self, job: JobId) -> float:
        """Return the seconds that a running job has run."""
        return self.clock() - self.running[job]

    def seconds_left(self) -> float | None:
        """Return the estimated seconds to the end; None until a job has ended."""
        if not self._seconds:
            return None
        ahead = {job: self._expected(job) for job in self.remaining}
        for job in self.running:
            ahead[job] = max(0.0, self._expected(job) - self.elapsed(job))
        longest = max((ahead[job] for job in self.running), default=0.0)
        return max(longest, sum(ahead.values()) / self._max_running)

    def _expected(self, job: JobId) -> float:
        task, _, method = job
        same = self._seconds.get((task, method))
        return fmean(same) if same else fmean(seconds for times in self._seconds.values() for seconds in times)
