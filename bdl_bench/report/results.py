"""Records gathered by task: which methods and seeds there are, with their arrays and measured metrics at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import METHODS
from bdl_bench.metrics import METRICS, Metric, evaluate, metrics_of
from bdl_bench.records.record import Record, RecordStore
from bdl_bench.report.arrays import ArrayView
from bdl_bench.report.pairing import Rows, orders_between, rows_of, why_not_comparable

__all__ = ["TaskResults", "Variant", "gather", "readable"]

Variant = bool
"""False: as fitted; True: tuned."""
Arrays = dict[str, NDArray[Any]]
_SMALL = 2**22
"""Bytes of a file whose arrays are read and kept together; of larger ones only what figures need is kept."""


@dataclass
class TaskResults:
    """The finished cells of one task: `done[method][seed]`; methods in the order of the registry.

    The arrays of all methods of a seed are in one order of rows, that of the first method, whatever order they were
    written in.
    """

    name: str
    summary: str
    kind: str
    store: RecordStore
    done: dict[str, dict[int, Record]]
    _arrays: dict[tuple[str, int], ArrayView] = field(default_factory=dict)
    _identities: dict[tuple[str, int], Rows] = field(default_factory=dict)
    _measured: dict[tuple[str, int, Variant], dict[str, float]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Methods with at least one finished cell."""
        return list(self.done)

    @property
    def seeds(self) -> list[int]:
        """Seeds with at least one finished cell."""
        return sorted({seed for records in self.done.values() for seed in records})

    @property
    def complete_methods(self) -> list[str]:
        """Methods that finished every seed, whose means can be compared; those with most seeds where none did."""
        most = max(len(seeds) for seeds in self.done.values())
        return [m for m, seeds in self.done.items() if len(seeds) == most]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Every metric that some method has, but under shift: there it is drawn, not compared."""
        found = {metric.key: metric for metric in METRICS[self.kind]}
        for method in self.methods:
            predictions = self.predictions(method, min(self.done[method])).scored()
            found |= {metric.key: metric for metric in metrics_of(self.kind, predictions)}
        return tuple(metric for key, metric in found.items() if not key.startswith("shift/"))

    @property
    def tuned_methods(self) -> list[str]:
        """Methods of which every finished cell was also tuned."""
        return [m for m in self.methods if all(self.arrays(m, s).tuned() is not None for s in self.done[m])]

    def arrays(self, method: str, seed: int) -> ArrayView:
        """The arrays of a finished cell; they are kept until `forget`."""
        place = (method, seed)
        if place not in self._arrays:
            path = self._path(method, seed)
            orders = orders_between(self._rows(method, seed), self._rows(self._first_method(seed), seed))
            self._arrays[place] = ArrayView.of(path, read=path.stat().st_size < _SMALL, orders=orders)
        return self._arrays[place]

    def predictions(self, method: str, seed: int, *, tuned: Variant = False) -> ArrayView:
        """The arrays of a finished cell as fitted, or of the tuned estimator."""
        return _variant(self.arrays(method, seed), tuned=tuned)

    def measured(self, method: str, seed: int, *, tuned: Variant = False) -> dict[str, float]:
        """Every metric of a cell, computed now from its arrays, so that new metrics apply to old records."""
        place = (method, seed, tuned)
        if place not in self._measured:
            path = self._path(method, seed)
            large = path.stat().st_size >= _SMALL
            view = ArrayView.of(path, read=True) if large else self.arrays(method, seed)
            self._measured[place] = evaluate(self.kind, dict(_variant(view, tuned=tuned).scored()))
        return self._measured[place]

    def shared_seeds(self, method: str, other: str) -> list[int]:
        """Seeds that both have."""
        return sorted(self.done.get(method, {}).keys() & self.done.get(other, {}).keys())

    def values(self, method: str, key: str, *, tuned: Variant = False) -> list[float]:
        """A metric of a method, one value a seed; empty where a seed has none."""
        found = [self.measured(method, seed, tuned=tuned) for seed in sorted(self.done[method])]
        return [values[key] for values in found] if all(key in values for values in found) else []

    def pooled(self, method: str, *, tuned: Variant = False) -> Arrays:
        """The test rows of all seeds of a method, one after the other."""
        parts = [self.predictions(method, seed, tuned=tuned) for seed in sorted(self.done[method])]
        names = [name for name in parts[0] if "/" not in name and all(name in part for part in parts)]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def forget(self) -> None:
        """Let go of every array."""
        self._arrays.clear()

    def _first_method(self, seed: int) -> str:
        return next(method for method, seeds in self.done.items() if seed in seeds)

    def _rows(self, method: str, seed: int) -> Rows:
        if (method, seed) not in self._identities:
            self._identities[method, seed] = rows_of(self._path(method, seed))
        return self._identities[method, seed]

    def _path(self, method: str, seed: int) -> Path:
        record = self.done[method][seed]
        assert record.arrays is not None
        return self.store.directory / record.arrays


def _variant(view: ArrayView, *, tuned: Variant) -> ArrayView:
    found = view.tuned() if tuned else view.fitted()
    assert found is not None
    return found


def readable(store: RecordStore) -> list[Record]:
    """Every record that can be read; one that must not be compared with the others counts as failed, with the reason.

    That is one whose arrays are gone or damaged; one of other data, code or options than the last that was run; and one
    whose rows are not those of the last record of its task and seed.
    """
    found = [_with_arrays(store, record) for record in store.all()]
    newest = _Newest(sorted((r for r in found if r.status == "ok"), key=store.written, reverse=True))
    checked = [newest.checked(record) for record in found]
    return _of_the_same_rows(store, checked)


class _Newest:
    """What the records of a task, of a seed and of a method must have in common: what the last one has."""

    def __init__(self, newest_first: Sequence[Record]) -> None:
        self.problems: dict[tuple[str, int], str] = {}
        self.task_codes: dict[str, str] = {}
        self.method_codes: dict[tuple[str, str], str] = {}
        for record in newest_first:
            self.problems.setdefault((record.task, record.seed), record.problem)
            self.task_codes.setdefault(record.task, record.task_code)
            self.method_codes.setdefault((record.task, record.method), record.method_code)

    def checked(self, record: Record) -> Record:
        """The record, or as failed."""
        if record.status != "ok":
            return record
        if record.problem != self.problems[record.task, record.seed]:
            return _failed(record, "of other data, code or device than the last run of its task and seed")
        if record.task_code != self.task_codes[record.task]:
            return _failed(record, "of other code than the last run of its task with another seed")
        if record.method_code != self.method_codes[record.task, record.method]:
            return _failed(record, "of other code or options of its method than the last run with another seed")
        return record


def _of_the_same_rows(store: RecordStore, records: list[Record]) -> list[Record]:
    """Records of other rows than the last one of their task and seed as failed."""
    reference: dict[tuple[str, int], tuple[str, Rows]] = {}
    ok = [record for record in records if record.status == "ok" and record.arrays is not None]
    for record in sorted(ok, key=store.written, reverse=True):
        if (record.task, record.seed) not in reference:
            reference[record.task, record.seed] = record.method, rows_of(store.directory / str(record.arrays))
    checked = []
    for record in records:
        if record.status == "ok" and record.arrays is not None:
            method, rows = reference[record.task, record.seed]
            reason = why_not_comparable(rows_of(store.directory / record.arrays), rows)
            record = record if reason is None else _failed(record, f"not comparable with {method}: {reason}")
        checked.append(record)
    return checked


def _with_arrays(store: RecordStore, record: Record) -> Record:
    if record.status != "ok" or store.arrays_are_complete(record):
        return record
    return _failed(record, f"its arrays are gone or damaged: {record.arrays}")


def _failed(record: Record, reason: str) -> Record:
    remedy = "run its method again; the same command with the same --out does."
    return record.model_copy(update={"status": "failed", "reason": f"{reason}; {remedy}"})


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
