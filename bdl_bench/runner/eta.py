"""The state of a grid from its progress events: which jobs run, which have ended, and the estimated time left."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from statistics import fmean, median

from bdl_bench.runner.events import ENDINGS, Event, JobId

__all__ = ["TimeEstimate"]


class TimeEstimate:
    """Counts of jobs and the estimated time left (ETA).

    A job is expected to take the mean time of the same method on the same task, tuning included. If none of these has
    run, it is the mean time of the method on another task, times the median ratio of the two tasks' times of methods
    that both have, so that a method whose tuning trains many networks is known to be slow. If the method has not run at
    all, it is the mean time of all evaluations; a training says nothing on how long an evaluation takes.

    Time left = the expected time of all remaining jobs, divided by the largest number that have run at the same time,
    and at least the expected rest of the longest running job.
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
        """Return the estimated seconds to the end; None until a job of each remaining kind has ended."""
        kinds = {method is None for _, _, method in self.remaining}
        if not self._seconds or not kinds <= {method is None for _, method in self._seconds}:
            return None
        ahead = {job: self._expected(job) for job in self.remaining}
        for job in self.running:
            ahead[job] = max(0.0, self._expected(job) - self.elapsed(job))
        longest = max((ahead[job] for job in self.running), default=0.0)
        return max(longest, sum(ahead.values()) / self._max_running)

    def _expected(self, job: JobId) -> float:
        task, _, method = job
        means = {key: fmean(times) for key, times in self._seconds.items()}
        if (task, method) in means:
            return means[task, method]
        elsewhere = [
            seconds * self._ratio(means, task, other) for (other, same), seconds in means.items() if same == method
        ]
        if elsewhere:
            return fmean(elsewhere)
        same_kind = [s for (_, m), times in self._seconds.items() if (m is None) == (method is None) for s in times]
        return fmean(same_kind)

    @staticmethod
    def _ratio(means: Mapping[tuple[str, str | None], float], task: str, other: str) -> float:
        """Return how much longer the methods take on a task than on another one; 1 if they have no method in common."""
        common = [m for (name, m) in means if name == task and (other, m) in means and means[other, m] > 0]
        return median(means[task, m] / means[other, m] for m in common) if common else 1.0
