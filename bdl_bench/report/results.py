"""Records by task, with their arrays and metrics."""

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
from bdl_bench.report.selection import EVERYTHING, Selection

__all__ = ["TaskResults", "group_by_task", "load_records"]

Arrays = dict[str, NDArray[Any]]
_SMALL = 2**22
"""Bytes. All arrays of a smaller file are read and cached; of a larger one only the arrays that figures use are."""


@dataclass
class TaskResults:
    """The finished runs of one task: `finished[method][seed]`, methods in the order of the registry.

    The arrays of all methods of a seed are put into the row order of the first method.
    """

    name: str
    summary: str
    kind: str
    store: RecordStore
    finished: dict[str, dict[int, Record]]
    selection: Selection = field(default_factory=Selection)
    _arrays: dict[tuple[str, int], ArrayView] = field(default_factory=dict)
    _identities: dict[tuple[str, int], Rows] = field(default_factory=dict)
    _metric_values: dict[tuple[str, int, bool], dict[str, float]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Methods with at least one finished run."""
        return list(self.finished)

    @property
    def seeds(self) -> list[int]:
        """Seeds with at least one finished run."""
        return sorted({seed for records in self.finished.values() for seed in records})

    @property
    def complete_methods(self) -> list[str]:
        """Methods that finished every seed; if none did, those that finished most seeds."""
        most = max(len(seeds) for seeds in self.finished.values())
        return [m for m, seeds in self.finished.items() if len(seeds) == most]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The selected ones of `all_metrics`."""
        return self.selection.of_metrics(self.all_metrics)

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """Every metric that some method has, except those of shifted rows, which are shown in figures only."""
        found: dict[str, Metric] = {}
        for method in self.methods:
            predictions = self.predictions(method, min(self.finished[method])).for_metrics()
            found |= {metric.key: metric for metric in metrics_of(self.kind, predictions)}
        return tuple(metric for key, metric in found.items() if not key.startswith("shift/")) + self._recorded_metrics

    @property
    def _recorded_metrics(self) -> tuple[Metric, ...]:
        """The metrics of plugins that are not loaded: their values are in the records."""
        known = {metric.key for metric in METRICS[self.kind]}
        records = [record for seeds in self.finished.values() for record in seeds.values()]
        found = {key: own for record in records for key, own in record.own_metrics.items() if key not in known}
        return tuple(Metric(key, m.label, m.reading, m.better, relevant=m.relevant) for key, m in found.items())

    @property
    def own_training_rows(self) -> bool:
        """Whether each method has chosen its training rows, so that variances of two methods are not comparable."""
        return any("decision/queried" in self.arrays(m, min(self.finished[m])) for m in self.methods)

    @property
    def tuned_methods(self) -> list[str]:
        """Methods of which every finished run was tuned."""
        return [m for m in self.methods if all(self.arrays(m, s).tuned() is not None for s in self.finished[m])]

    @property
    def all_tuned(self) -> bool:
        """Whether every method was tuned, so that the tuned estimators can be compared."""
        return self.tuned_methods == self.methods

    def arrays(self, method: str, seed: int) -> ArrayView:
        """Return the arrays of a finished run; they are cached until `release_arrays`."""
        run = (method, seed)
        if run not in self._arrays:
            path = self._path(method, seed)
            orders = orders_between(
                self.rows(method, seed),
                self.rows(next(m for m, seeds in self.finished.items() if seed in seeds), seed),
            )
            self._arrays[run] = ArrayView.open(path, read=path.stat().st_size < _SMALL, orders=orders)
        return self._arrays[run]

    def predictions(self, method: str, seed: int, *, tuned: bool = False) -> ArrayView:
        """Return the arrays of the untuned or the tuned estimator of a finished run."""
        return _variant(self.arrays(method, seed), tuned=tuned)

    def metric_values(self, method: str, seed: int, *, tuned: bool = False) -> dict[str, float]:
        """Return every metric of a run, computed from its arrays, so that new metrics apply to old records."""
        run = (method, seed, tuned)
        if run not in self._metric_values:
            path = self._path(method, seed)
            large = path.stat().st_size >= _SMALL
            view = ArrayView.open(path, read=True) if large else self.arrays(method, seed)
            record = self.finished[method][seed]
            kept = record.tuned if tuned else record.metrics
            recorded = {key: kept[key] for key in record.own_metrics if key in kept}
            self._metric_values[run] = recorded | evaluate(self.kind, dict(_variant(view, tuned=tuned).for_metrics()))
        return self._metric_values[run]

    def shared_seeds(self, method: str, other: str) -> list[int]:
        """Return the seeds that both methods finished."""
        return sorted(self.finished.get(method, {}).keys() & self.finished.get(other, {}).keys())

    def values(self, method: str, key: str, *, tuned: bool = False) -> list[float]:
        """Return a metric of a method, one value per seed; empty if a seed has none."""
        found = [self.metric_values(method, seed, tuned=tuned) for seed in sorted(self.finished[method])]
        return [values[key] for values in found] if all(key in values for values in found) else []

    def pooled(self, method: str, *, tuned: bool = False) -> Arrays:
        """Return the arrays of the test rows of a method, concatenated over its seeds."""
        parts = [self.predictions(method, seed, tuned=tuned) for seed in sorted(self.finished[method])]
        names = [name for name in parts[0] if "/" not in name and all(name in part for part in parts)]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def release_arrays(self) -> None:
        """Drop every cached array."""
        self._arrays.clear()

    def rows(self, method: str, seed: int) -> Rows:
        """Return the identities and targets of the rows of a finished run, in the order of its file."""
        if (method, seed) not in self._identities:
            self._identities[method, seed] = rows_of(self._path(method, seed))
        return self._identities[method, seed]

    def _path(self, method: str, seed: int) -> Path:
        record = self.finished[method][seed]
        assert record.arrays is not None
        return self.store.directory / record.arrays


def _variant(view: ArrayView, *, tuned: bool) -> ArrayView:
    found = view.tuned() if tuned else view.untuned()
    assert found is not None
    return found


def load_records(store: RecordStore) -> list[Record]:
    """Return every readable record. A record that is not comparable with the others is returned as failed.

    A record is not comparable if its arrays are missing or damaged, if it was made with other data, code or options
    than the newest record, or if its rows differ from those of the newest record of its task and seed.
    """
    found = [_with_arrays(store, record) for record in store.all()]
    newest = _Newest(sorted((r for r in found if r.status == "ok"), key=store.written, reverse=True))
    checked = [newest.checked(record) for record in found]
    return _with_same_rows(store, checked)


class _Newest:
    """Digests of data, code and options of the newest record of each task, seed and method."""

    def __init__(self, newest_first: Sequence[Record]) -> None:
        self.problems: dict[tuple[str, int], str] = {}
        self.task_codes: dict[str, str] = {}
        self.method_codes: dict[tuple[str, str], str] = {}
        for record in newest_first:
            self.problems.setdefault((record.task, record.seed), record.problem)
            self.task_codes.setdefault(record.task, record.task_code)
            self.method_codes.setdefault((record.task, record.method), record.method_code)

    def checked(self, record: Record) -> Record:
        """Return the record, as failed if its digests differ from those of the newest one."""
        if record.status != "ok":
            return record
        if record.problem != self.problems[record.task, record.seed]:
            return _failed(record, "made with other data, code or device than the newest run of its task and seed")
        if record.task_code != self.task_codes[record.task]:
            return _failed(record, "made with other code than the newest run of its task with another seed")
        if record.method_code != self.method_codes[record.task, record.method]:
            return _failed(
                record, "made with other code or options of its method than the newest run with another seed"
            )
        return record


def _with_same_rows(store: RecordStore, records: list[Record]) -> list[Record]:
    """Return the records, as failed if their rows differ from those of the newest one of their task and seed."""
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
    return _failed(record, f"its arrays are missing or damaged: {record.arrays}")


def _failed(record: Record, reason: str) -> Record:
    remedy = "to run it again, repeat the same command with the same --out."
    return record.model_copy(update={"status": "failed", "reason": f"{reason}; {remedy}"})


def group_by_task(
    store: RecordStore, records: Iterable[Record], selection: Selection = EVERYTHING
) -> list[TaskResults]:
    """Return the results of each task that has at least one finished run."""
    tasks: dict[str, TaskResults] = {}
    rank = {name: i for i, name in enumerate(METHODS)}
    for record in sorted(records, key=lambda r: (r.task, rank.get(r.method, len(rank)), r.method, r.seed)):
        if record.status != "ok" or record.kind is None:
            continue
        if record.task not in tasks:
            tasks[record.task] = TaskResults(record.task, record.task_summary, record.kind, store, {}, selection)
        tasks[record.task].finished.setdefault(record.method, {})[record.seed] = record
    return list(tasks.values())
