"""Records gathered by task: which methods and seeds there are, with their arrays at hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import METHODS
from bdl_bench.metrics import METRICS, Metric
from bdl_bench.records import Record, RecordStore

__all__ = ["TaskResults", "gather"]

Arrays = dict[str, NDArray[Any]]


@dataclass
class TaskResults:
    """The finished cells of one task: `done[method][seed]`; methods in the order of the registry."""

    name: str
    summary: str
    kind: str
    store: RecordStore
    done: dict[str, dict[int, Record]]
    _arrays: dict[tuple[str, int], Arrays] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Methods with at least one finished cell."""
        return list(self.done)

    @property
    def seeds(self) -> list[int]:
        """Seeds with at least one finished cell."""
        return sorted({seed for records in self.done.values() for seed in records})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of this kind of likelihood."""
        return METRICS[self.kind]

    def arrays(self, method: str, seed: int) -> Arrays:
        """The per-example arrays of a finished cell, read once."""
        place = (method, seed)
        if place not in self._arrays:
            self._arrays[place] = self.store.arrays(self.done[method][seed])
        return self._arrays[place]

    def shared_seeds(self, method: str, other: str) -> list[int]:
        """Seeds that both have."""
        return sorted(self.done.get(method, {}).keys() & self.done.get(other, {}).keys())

    def values(self, method: str, key: str) -> list[float]:
        """A metric of a method, one value a seed."""
        return [record.metrics[key] for _, record in sorted(self.done[method].items())]

    def pooled(self, method: str) -> Arrays:
        """The arrays of all seeds of a method, one after the other."""
        parts = [self.arrays(method, seed) for seed in sorted(self.done[method])]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def gather(store: RecordStore, records: Iterable[Record]) -> list[TaskResults]:
    """One entry a task that has at least one finished cell."""
    tasks: dict[str, TaskResults] = {}
    rank = {name: i for i, name in enumerate(METHODS)}
    for record in sorted(records, key=lambda r: (r.task, rank.get(r.method, len(rank)), r.method, r.seed)):
        if record.status != "ok" or record.kind is None:
            continue
        if record.task not in tasks:
            tasks[record.task] = TaskResults(record.task, record.task_summary, record.kind, store, {})
        tasks[record.task].done.setdefault(record.method, {})[record.seed] = record
    return list(tasks.values())
