"""The grid: train once per (task, seed), then task × method × seed, each cell a record; what is done stays done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bdl_bench.cells import Cell, failed, run_cell
from bdl_bench.executors import ONE_WORKER, Outcome, Workers, run_all
from bdl_bench.maps import Prepared, prepare
from bdl_bench.methods import methods_named
from bdl_bench.records import Record, RecordStore, Training
from bdl_bench.tasks import resolve_task
from estimators.errors import OptionError

__all__ = ["Event", "Grid"]


@dataclass(frozen=True)
class Event:
    """Something to show: status started, trained, cached, ok, skipped or failed; a method of None is the training."""

    task: str
    seed: int
    method: str | None
    status: str
    seconds: float | None = None
    reason: str | None = None


Listener = Callable[[Event], None]
_Place = tuple[str, int]


@dataclass(frozen=True)
class Grid:
    """Tasks (names or "module:factory"), methods and seeds to run into `directory`."""

    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    directory: Path
    device: str = "cpu"
    workers: Workers = ONE_WORKER
    tune: int = 0
    """Fits that each method may spend on its option; 0 tunes nothing, 1 the calibration of the given fit alone."""

    def check(self) -> None:
        """OptionError for an unknown task, method or device, for nothing to run, and for no workers."""
        _check_device(self.device)
        for task in self.tasks:
            resolve_task(task)
        methods_named(self.methods)
        if not (self.tasks and self.methods and self.seeds):
            raise OptionError("a task, a method and a seed at least", received="none", remedy="name some.")
        if self.tune < 0:
            raise OptionError("tune >= 0", received=str(self.tune), remedy="0 for no tuning, 5 for five fits a method.")
        if min(self.workers.jobs, self.workers.threads) < 1:
            raise OptionError(
                "jobs and threads >= 1", received=str(self.workers), remedy="--jobs 1 runs everything in this process."
            )

    @property
    def n_steps(self) -> int:
        """How many trainings and cells there are."""
        return len(self.tasks) * len(self.seeds) * (1 + len(self.methods))

    def run(self, listener: Listener) -> list[Record]:
        """Run what is not yet done; the records of every cell, in the order of the grid."""
        self.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        records = self._run_cells(self._prepare(listener), listener)
        order = [(t, m, s) for t in self.tasks for m in self.methods for s in self.seeds]
        return [records[place] for place in order]

    def _prepare(self, listener: Listener) -> dict[_Place, Outcome[Prepared]]:
        places = [(task, seed) for task in self.tasks for seed in self.seeds]
        work = partial(_prepare_place, directory=self.directory, device=self.device)
        found: dict[_Place, Outcome[Prepared]] = {}
        for place, outcome in run_all(
            work, places, workers=self.workers, started=lambda p: listener(_training_started(p))
        ):
            found[place] = outcome
            listener(_training_ended(place, outcome))
        return found

    def _run_cells(
        self, prepared: dict[_Place, Outcome[Prepared]], listener: Listener
    ) -> dict[tuple[str, str, int], Record]:
        store = RecordStore(self.directory)
        records: dict[tuple[str, str, int], Record] = {}

        def done(record: Record, status: str) -> None:
            records[record.task, record.method, record.seed] = record
            seconds = record.cost.fit_seconds + record.cost.predict_seconds if record.cost else None
            listener(Event(record.task, record.seed, record.method, status, seconds, record.reason))

        to_run: list[Cell] = []
        for place, outcome in prepared.items():
            for method in self.methods:
                cell = self._cell(place, method, outcome)
                if isinstance(outcome, Exception):
                    done(store.write(failed(cell, outcome)), "failed")
                elif (record := store.valid(*place[:1], method, place[1], key=cell.key)) is not None:
                    done(record, "cached")
                else:
                    to_run.append(cell)
        for cell, result in run_all(
            run_cell, to_run, workers=self.workers, started=lambda c: listener(_cell_started(c))
        ):
            record = store.write(failed(cell, result)) if isinstance(result, Exception) else result
            done(record, record.status)
        return records

    def _cell(self, place: _Place, method: str, outcome: Outcome[Prepared]) -> Cell:
        if isinstance(outcome, Exception):
            outcome = Prepared(*place, key="", training=Training(seconds=None, recipe=None), cached=False)
        return Cell(outcome, method, self.directory, self.device, self.tune)


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError("a device that is here", received=f"{name!r}: {reason}", remedy="--device cpu.") from error


def _prepare_place(place: _Place, *, directory: Path, device: str) -> Prepared:
    return prepare(*place, directory, device)


def _training_started(place: _Place) -> Event:
    return Event(*place, None, "started")


def _training_ended(place: _Place, outcome: Outcome[Prepared]) -> Event:
    if isinstance(outcome, Exception):
        return Event(*place, None, "failed", reason=f"{type(outcome).__name__}: {outcome}")
    return Event(*place, None, "cached" if outcome.cached else "trained", outcome.training.seconds)


def _cell_started(cell: Cell) -> Event:
    return Event(cell.prepared.task, cell.prepared.seed, cell.method, "started")
