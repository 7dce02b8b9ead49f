"""Progress of a comparison: live bars on a terminal, plain lines elsewhere.

The remaining time is that of `TimeEstimate`. `rich.progress.TimeRemainingColumn` assumes that all jobs take the
same time, and a comparison has jobs of milliseconds and of minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from bdl_bench.runner.eta import TimeEstimate
from bdl_bench.runner.events import ENDINGS, Event, JobId
from estimators.runtime.units import in_seconds

__all__ = ["show_progress"]

_COLOURS = {"failed": "red", "skipped": "yellow", "cached": "dim"}
_MAX_SHOWN = 12  # running jobs; a cluster may have hundreds
_PAUSE = 30.0  # seconds between two summaries in plain lines


@contextmanager
def show_progress(
    console: Console, n_jobs: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[Event], None]]:
    """Yield a listener for the events of a run with `n_jobs` jobs (trainings and evaluations)."""
    estimate = TimeEstimate(n_jobs, clock)
    if console.is_terminal:
        bars = _Bars(console, estimate)
        with bars.progress:
            yield bars
    else:
        yield _PlainLines(console, estimate)


class _TextColumn(ProgressColumn):
    """The text of a task, computed anew at each refresh, so that times advance between events."""

    max_refresh = None

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        return Text(task.fields["text"](), no_wrap=True, overflow="ellipsis")


class _Bars:
    """A bar for the whole run, and one for each running job."""

    def __init__(self, console: Console, estimate: TimeEstimate) -> None:
        self.estimate = estimate
        # The refresh thread of rich reads the estimate while events change it. It holds the lock of Progress then, so
        # that no method of Progress may be called with this lock held.
        self.lock = Lock()
        self.progress = Progress(BarColumn(30), _TextColumn(), console=console, transient=True, get_time=estimate.clock)
        self.total = self.progress.add_task("", total=estimate.n_jobs, text=self._summary)
        self.jobs: dict[JobId, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Show one event."""
        with self.lock:
            self.estimate.update(event)
            running = list(self.estimate.running)
        self.progress.update(self.total, completed=self.estimate.n_ended)
        for job in self.jobs.keys() - set(running):
            self.progress.remove_task(self.jobs.pop(job))
        for job in running:
            if job not in self.jobs:
                visible, text = len(self.jobs) < _MAX_SHOWN, partial(self._running, job)
                self.jobs[job] = self.progress.add_task("", total=None, visible=visible, text=text)
        for i, task in enumerate(self.jobs.values()):
            self.progress.update(task, visible=i < _MAX_SHOWN)
        if event.status in ENDINGS:
            self.progress.console.print(_line(event), highlight=False)

    def _summary(self) -> str:
        with self.lock:
            elapsed = in_seconds(self.estimate.clock() - self.estimate.start)
            running = [f"{len(self.jobs)} running"] if self.jobs else []
            return ", ".join([_counts(self.estimate), *running, elapsed, *_time_left(self.estimate)])

    def _running(self, job: JobId) -> str:
        with self.lock:
            return _running(self.estimate, job) if job in self.estimate.running else ""


class _PlainLines:
    """One line per event, as `[ 3/42] task seed 0 method: ok, 1.2 s`, and a summary from time to time."""

    def __init__(self, console: Console, estimate: TimeEstimate) -> None:
        self.console, self.estimate = console, estimate
        self.last = estimate.clock()

    def __call__(self, event: Event) -> None:
        """Print one event."""
        self.estimate.update(event)
        if event.status == "waiting":
            self._print(_line(event))
        if event.status not in ENDINGS:
            return
        n = self.estimate.n_jobs
        self._print(f"\\[{self.estimate.n_ended:>{len(str(n))}}/{n}] " + _line(event))
        if self.estimate.clock() - self.last >= _PAUSE:
            self.last = self.estimate.clock()
            running = [_running(self.estimate, job) for job in list(self.estimate.running)[:_MAX_SHOWN]]
            listed = [f"running: {', '.join(running)}"] if running else []
            self._print(escape("; ".join([_counts(self.estimate), *listed, *_time_left(self.estimate)])))

    def _print(self, markup: str) -> None:
        self.console.print(markup, soft_wrap=True, highlight=False)


def _counts(estimate: TimeEstimate) -> str:
    bad = [f"{estimate.counts[status]} {status}" for status in ("failed", "skipped") if estimate.counts[status]]
    return ", ".join([f"{estimate.n_ended} of {estimate.n_jobs} done", *bad])


def _time_left(estimate: TimeEstimate) -> list[str]:
    seconds = estimate.seconds_left()
    return [] if seconds is None or not estimate.remaining else [f"about {in_seconds(max(1.0, seconds))} left"]


def _running(estimate: TimeEstimate, job: JobId) -> str:
    return f"{_name(job)} ({in_seconds(max(0.0, estimate.elapsed(job)))})"


def _name(job: JobId) -> str:
    task, seed, method = job
    return f"{task} seed {seed} {method or 'training'}"


def _line(event: Event) -> str:
    """Return one line of markup for an event that ended a job."""
    status = "locked by another run" if event.status == "waiting" else event.status
    parts = [status, "" if event.seconds is None else in_seconds(event.seconds), event.reason or ""]
    text = escape(f"{_name(event.job)}: " + ", ".join(part for part in parts if part))
    colour = _COLOURS.get(event.status)
    return f"[{colour}]{text}[/{colour}]" if colour else text
