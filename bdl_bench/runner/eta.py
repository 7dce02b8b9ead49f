"""How far a grid is: what runs, what has ended, and how long the rest may take."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import fmean

from bdl_bench.runner.events import ENDINGS, Event

__all__ = ["JobId", "TimeEstimate"]

JobId = tuple[str, int, str | None]


class TimeEstimate:
    """The state of a grid, from its events and a clock.

    A step is expected to take the mean of what the same method on the same task has taken, or of all that have run
    where that is none. Time left = what remains of all steps, divided by how many have run at a time, and at least
    what remains of the longest that runs.
    """

    def __init__(self, n_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.n_steps, self.clock = n_steps, clock
        self.begun = clock()
        self.left: dict[JobId, None] = {}
        self.running: dict[JobId, float] = {}
        self.counts: Counter[str] = Counter()
        self._took: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
        self._width = 1

    def hear(self, event: Event) -> None:
        """Take an event into account."""
        if event.status == "planned":
            self.left[event.step] = None
        elif event.status == "started":
            self.running[event.step] = self.clock()
            self._width = max(self._width, len(self.running))
        elif event.status in ENDINGS:
            self._end(event)

    @property
    def n_ended(self) -> int:
        """How many steps have ended, in whatever way."""
        return sum(self.counts.values())

    def elapsed(self, step: JobId) -> float:
        """Seconds that a step has run."""
        return self.clock() - self.running[step]

    def seconds_left(self) -> float | None:
        """Seconds to the end; None as long as nothing has been measured."""
        if not self._took:
            return None
        ahead = {step: self._expected(step) for step in self.left}
        for step in self.running:
            ahead[step] = max(0.0, self._expected(step) - self.elapsed(step))
        longest = max((ahead[step] for step in self.running), default=0.0)
        return max(longest, sum(ahead.values()) / self._width)

    def _end(self, event: Event) -> None:
        self.counts[event.status] += 1
        self.left.pop(event.step, None)
        since = self.running.pop(event.step, None)
        if since is not None:
            self._took[event.task, event.method].append(self.clock() - since)

    def _expected(self, step: JobId) -> float:
        same = self._took.get((step[0], step[2]))
        return fmean(same) if same else fmean(seconds for times in self._took.values() for seconds in times)
