"""What can start next: the first item that no other run is at and nobody has done meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from bdl_bench.runner.locks import FileLocks

__all__ = ["Schedule"]

Item = TypeVar("Item")


class Schedule(Iterator[Item | None], Generic[Item]):
    """Items in order, each claimed by the file that it will write; None where all that remain wait for something.

    Args:
        claims: the locks.
        target: the file that an item writes.
        to_run: asked about an item when it is claimed: the item as it is to be run, or None where it is settled.
        refused: told of an item that could not be claimed, and why.
        waiting: told, once, of an item that another run is at.

    An item stays claimed from when it was handed out to its `close`. Items may be added as long as one is not closed.
    """

    def __init__(
        self,
        claims: FileLocks,
        target: Callable[[Item], Path],
        *,
        to_run: Callable[[Item], Item | None],
        refused: Callable[[Item, Exception], None],
        waiting: Callable[[Item], None],
    ) -> None:
        self.claims, self.target = claims, target
        self.to_run, self.refused, self.waiting = to_run, refused, waiting
        self._queue: list[Item] = []
        self._open: set[Path] = set()
        self._told: set[Path] = set()

    def add(self, item: Item) -> None:
        """Put it behind the others."""
        self._queue.append(item)

    def close(self, item: Item) -> None:
        """It is done and written."""
        self._open.discard(self.target(item))
        self.claims.release(self.target(item))

    def __next__(self) -> Item | None:
        for item in tuple(self._queue):
            found = self._claimed(item)
            if found is not None:
                return found
        if not self._queue and not self._open:
            raise StopIteration
        return None

    def _claimed(self, item: Item) -> Item | None:
        path = self.target(item)
        try:
            if not self.claims.take(path):
                self._tell(item)
                return None
            found = self.to_run(item)
        except OSError as error:
            found = None
            self.refused(item, error)
        self._queue.remove(item)
        if found is None:
            self.claims.release(path)
            return None
        self._open.add(path)
        return found

    def _tell(self, item: Item) -> None:
        if self.target(item) not in self._told:
            self._told.add(self.target(item))
            self.waiting(item)
