"""Showing a grid at work: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bdl_bench.report.formatting import duration
from bdl_bench.runner.eta import TimeEstimate
from bdl_bench.runner.events import ENDINGS, Event, JobId

__all__ = ["shown"]

_COLOURS = {"failed": "red", "skipped": "yellow", "cached": "dim"}
_LINES = 12  # running jobs shown; a cluster may have hundreds
_PAUSE = 30.0  # seconds between two plain lines about all


@contextmanager
def shown(
    console: Console, n_jobs: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[Event], None]]:
    """A listener for a grid of n jobs (trainings and evaluations)."""
    outlook = TimeEstimate(n_jobs, clock)
    if not console.is_terminal:
        yield _PlainLines(console, outlook)
        return
    lock = RLock()  # a thread of the display reads what events change

    def board() -> Group:
        with lock:
            return _board(outlook)

    with Live(get_renderable=board, console=console, transient=True) as live:

        def listen(event: Event) -> None:
            with lock:
                outlook.update(event)
            if event.status in ENDINGS:
                live.console.print(_line(event), highlight=False)

        yield listen


class _PlainLines:
    """`[ 3/42] task seed 0 method: ok, 1.2 s`, for logs, and now and then how far all is."""

    def __init__(self, console: Console, outlook: TimeEstimate) -> None:
        self.console, self.outlook = console, outlook
        self.last = outlook.clock()

    def __call__(self, event: Event) -> None:
        self.outlook.update(event)
        if event.status == "waiting":
            self._print(_line(event))
        if event.status not in ENDINGS:
            return
        n = self.outlook.n_jobs
        self._print(f"\\[{self.outlook.n_ended:>{len(str(n))}}/{n}] " + _line(event))
        if self.outlook.clock() - self.last >= _PAUSE:
            self.last = self.outlook.clock()
            self._print(escape(_summary(self.outlook)))

    def _print(self, markup: str) -> None:
        self.console.print(markup, soft_wrap=True, highlight=False)


def _summary(outlook: TimeEstimate) -> str:
    """`12 of 42 done, 1 failed; running: task seed 0 laplace (12 s); about 3 min 5 s left`."""
    parts = [_counts(outlook)]
    if outlook.running:
        parts.append("running: " + ", ".join(_running(outlook, job) for job in list(outlook.running)[:_LINES]))
    return "; ".join([*parts, *_time_left(outlook)])


def _board(outlook: TimeEstimate) -> Group:
    """The bar and what stands beside it, then one line for each job that runs."""
    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=outlook.n_jobs, completed=outlook.n_ended, width=30)
    past = duration(outlook.clock() - outlook.start)
    head.add_row(bar, Text(", ".join([_counts(outlook), past, *_time_left(outlook)])))
    running = [Text(f"  {_running(outlook, job)}", no_wrap=True, overflow="ellipsis") for job in outlook.running]
    rest = [Text(f"  and {len(running) - _LINES} more")] if len(running) > _LINES else []
    return Group(head, *running[:_LINES], *rest)


def _counts(outlook: TimeEstimate) -> str:
    marked = [f"{outlook.counts[status]} {status}" for status in ("failed", "skipped") if outlook.counts[status]]
    return ", ".join([f"{outlook.n_ended} of {outlook.n_jobs} done", *marked])


def _time_left(outlook: TimeEstimate) -> list[str]:
    seconds = outlook.seconds_left()
    return [] if seconds is None or not outlook.remaining else [f"about {duration(max(1.0, seconds))} left"]


def _running(outlook: TimeEstimate, job: JobId) -> str:
    return f"{_name(job)} ({duration(max(0.0, outlook.elapsed(job)))})"


def _name(job: JobId) -> str:
    task, seed, method = job
    return f"{task} seed {seed} {method or 'training'}"


def _line(event: Event) -> str:
    """One line of markup for an event that ended."""
    status = "another run is at it" if event.status == "waiting" else event.status
    parts = [status, "" if event.seconds is None else duration(event.seconds), event.reason or ""]
    text = escape(f"{_name(event.job)}: " + ", ".join(part for part in parts if part))
    colour = _COLOURS.get(event.status)
    return f"[{colour}]{text}[/{colour}]" if colour else text
