"""Showing a grid at work: a live bar on a terminal, one plain line an event elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bdl_bench.events import ENDINGS, Event
from bdl_bench.report.text import duration

__all__ = ["shown"]

_COLOURS = {"failed": "red", "skipped": "yellow", "cached": "dim"}


@contextmanager
def shown(console: Console, n_steps: int) -> Iterator[Callable[[Event], None]]:
    """A listener for a grid of n steps (trainings and cells)."""
    if not console.is_terminal:
        yield _PlainLines(console, n_steps)
        return
    description = TextColumn("{task.description}")
    columns = (SpinnerColumn(), description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=n_steps)

        def listen(event: Event) -> None:
            if event.status not in ENDINGS:
                progress.update(bar, description=escape(_name(event)))
            else:
                progress.console.print(_line(event), highlight=False)
                progress.advance(bar)

        yield listen


class _PlainLines:
    """`[ 3/42] task seed 0 method: ok, 1.2 s`, for logs."""

    def __init__(self, console: Console, n_steps: int) -> None:
        self.console, self.n_steps, self.done = console, n_steps, 0

    def __call__(self, event: Event) -> None:
        if event.status not in ENDINGS:
            return
        self.done += 1
        count = f"\\[{self.done:>{len(str(self.n_steps))}}/{self.n_steps}] "
        self.console.print(count + _line(event), soft_wrap=True, highlight=False)


def _name(event: Event) -> str:
    return f"{event.task} seed {event.seed} {event.method or 'training'}"


def _line(event: Event) -> str:
    """One line of markup for an event that ended."""
    parts = [event.status, "" if event.seconds is None else duration(event.seconds), event.reason or ""]
    text = escape(f"{_name(event)}: " + ", ".join(part for part in parts if part))
    colour = _COLOURS.get(event.status)
    return f"[{colour}]{text}[/{colour}]" if colour else text
