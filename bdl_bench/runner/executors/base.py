"""What executors have in common: items in, (item, outcome) out as they come; an exception is an outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeAlias, TypeVar

__all__ = ["ONE_WORKER", "POLL_SECONDS", "Content", "Executor", "Limit", "Outcome", "Workers", "no_limit"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome: TypeAlias = Result | Exception
Limit: TypeAlias = Callable[[Item], float | None]
"""The seconds that an item may take; None for as long as it needs."""

POLL_SECONDS = 0.2
"""How long to wait before a source that had nothing to start is asked again."""


@dataclass(frozen=True)
class Workers:
    """Which executor, how many jobs at a time, and threads in each.

    Args:
        jobs: None is one job, and with ray as many as the cluster has room for.
        threads: one is as fast as many for small networks, and steady on a busy machine, where threads wait for each
            other. With ray they are the processors that a job reserves.
        executor: "in-process", "local" or "ray"; None is in-process for one job without a limit, and else local.
        timeout: seconds that a cell may take, tuning included; None is no limit. Trainings take what they need.
    """

    jobs: int | None = None
    threads: int = 1
    executor: str | None = None
    timeout: float | None = None

    @property
    def name(self) -> str:
        """The executor; where none was named, local for what needs other processes: several jobs, or a limit."""
        needs_processes = self.jobs not in (None, 1) or self.timeout is not None
        return self.executor or ("local" if needs_processes else "in-process")

    @property
    def exclusive(self) -> bool:
        """Whether only one job of this run is at work at any time, so that its cost is its own."""
        return self.name != "ray" and self.jobs in (None, 1)


ONE_WORKER = Workers()


def no_limit(item: object) -> None:
    """The `Limit` of items that take what they need."""


class Content(Protocol):
    """The bytes of a file, to be read wherever the work is."""

    def read_bytes(self) -> bytes:
        """All of them."""


class Executor(ABC):
    """Where work runs. Entered before the first item, left after the last one; leaving ends what still runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def run(
        self,
        work: Callable[[Item], Result],
        items: Iterator[Item | None],
        *,
        started: Callable[[Item], None],
        timeout: Limit[Item] = no_limit,
    ) -> Generator[tuple[Item, Outcome[Result]], None, None]:
        """Each item with its result, or with the exception that it raised, as they come.

        Args:
            work: a function of a module, where it runs in another process; so are items and results pickled.
            items: asked for the next one when there is room for it; a None says that nothing can start just now, and
                to ask again later.
            started: told of an item at the moment when it starts.
            timeout: the seconds that an item may take; one that takes longer is ended, its outcome a `TimeLimitError`.
        """

    def share(self, path: Path) -> Content:
        """The content of a file in a form that can be put into an item."""
        return path
