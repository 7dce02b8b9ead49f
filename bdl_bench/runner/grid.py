"""The grid: train once per (task, seed), then task × method × seed, each cell a record; what is done stays done."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch

from bdl_bench.methods import methods_named
from bdl_bench.records.predictions import Arrays
from bdl_bench.records.record import Record, RecordStore, Training
from bdl_bench.runner.directories import check_directory, make_directory
from bdl_bench.runner.disk import Disk
from bdl_bench.runner.evaluate_job import SKIP_ERRORS, EvaluationJob, EvaluationResult, failure_record
from bdl_bench.runner.events import Event, Listener
from bdl_bench.runner.executors import (
    ONE_WORKER,
    Executor,
    Outcome,
    TimeLimitError,
    Workers,
    check_workers,
    executor_for,
)
from bdl_bench.runner.jobs import Job, execute
from bdl_bench.runner.locks import FileLocks
from bdl_bench.runner.schedule import Schedule
from bdl_bench.runner.train_job import TrainedModel, TrainingJob, TrainingResult, checkpoint_path, known_training
from bdl_bench.tasks import resolve_task
from estimators.errors import OptionError
from estimators.persistence.atomic import discard_leftovers, write_bytes

__all__ = ["Event", "Grid", "GridRun"]


@dataclass(frozen=True)
class Grid:
    """Tasks (names or "module:factory"), methods and seeds to run into `directory`."""

    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    directory: Path
    device: str = "cpu"
    workers: Workers = ONE_WORKER
    tune_budget: int = 0
    """Fits that each method may spend on its option; 0 tunes nothing, 1 the calibration of the given fit alone."""

    def check(self) -> None:
        """OptionError for an unknown task, method or device, a directory or workers that cannot be, nothing to run."""
        for name in ("tasks", "methods"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise OptionError(f"{name} as a list of names", received=repr(value), remedy=f"[{value!r}].")
        for task in self.tasks:
            resolve_task(task)
        methods_named(self.methods)
        if not (self.tasks and self.methods and self.seeds):
            raise OptionError("a task, a method and a seed at least", received="none", remedy="name some.")
        if self.tune_budget < 0:
            raise OptionError(
                "tune_budget >= 0", received=str(self.tune_budget), remedy="0 for no tuning, 5 for five fits a method."
            )
        check_workers(self.workers)
        check_directory(self.directory)
        _check_device(self.device, elsewhere=self.workers.name == "ray")

    @property
    def steps(self) -> list[tuple[str, int, str | None]]:
        """Every training and every cell once: task, seed, method; a method of None is the training."""
        places = [(task, seed) for task in dict.fromkeys(self.tasks) for seed in dict.fromkeys(self.seeds)]
        cells = [(*place, method) for place in places for method in dict.fromkeys(self.methods)]
        return [*((*place, None) for place in places), *cells]

    @property
    def n_steps(self) -> int:
        """How many trainings and cells there are."""
        return len(self.steps)

    def run(self, listener: Listener) -> list[Record]:
        """Run what is not yet done; the records of every cell, in the order tasks, methods, seeds.

        Several runs into one directory, of this machine or others, share the work. Leaving by an exception (Ctrl-C)
        keeps what is done and ends what is under way. Errors: OptionError as of `check`; FullDiskError.
        """
        self.check()
        for step in self.steps:
            listener(Event(*step, "planned"))
        with ExitStack() as stack:
            with Disk(self.directory).writing():
                make_directory(self.directory)
                claims = stack.enter_context(FileLocks(self.directory))
            executor = stack.enter_context(executor_for(self.workers, device=self.device))
            records = GridRun(self, listener, executor, claims).run()
        order = [(t, s, m) for t in self.tasks for m in self.methods for s in self.seeds]
        return [records[place] for place in order]


def _check_device(name: str, *, elsewhere: bool) -> None:
    try:
        device = torch.device(name)
        if not (elsewhere and device.type == "cuda"):
            torch.zeros(1, device=device)
        elif device.index:
            raise RuntimeError("ray gives each job one GPU, whose number is 0 there")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            "a device that is here", received=f"{name!r}: {reason}", remedy="--device cpu or cuda."
        ) from error


Step: TypeAlias = tuple[str, int, str | None]


class GridRun:
    """One run of a grid. A cell can start when its network is trained; only this process writes into the directory."""

    def __init__(self, grid: Grid, listener: Listener, executor: Executor, claims: FileLocks) -> None:
        self.grid, self.listener, self.executor, self.claims = grid, listener, executor, claims
        self.store, self.disk = RecordStore(grid.directory), Disk(grid.directory)
        self.records: dict[Step, Record] = {}
        self.exclusive: dict[Path, bool] = {}
        self.too_slow: dict[tuple[str, str], int] = {}
        self.before = {path: _mark(path) for path in self._record_paths()}
        self.schedule: Schedule[Job] = Schedule(
            claims, self._target, to_run=self._to_run, refused=self._ended, waiting=lambda i: self._tell(i, "waiting")
        )

    def run(self) -> dict[Step, Record]:
        """The records of all cells: found, made, or made by another run meanwhile."""
        for task, seed, method in self.grid.steps:
            if method is None:
                self.schedule.add(TrainingJob(task, seed, self.grid.device))
        running: Generator[tuple[Job, Outcome[TrainingResult | EvaluationResult]], None, None]
        running = self.executor.run(execute, self.schedule, started=self._started, timeout=self._limit)
        with closing(running) as outcomes:
            for item, outcome in outcomes:
                self._ended(item, outcome)
                self.schedule.close(item)
        return self.records

    def _record_paths(self) -> Iterator[Path]:
        return (self.store.path(task, method, seed) for task, seed, method in self.grid.steps if method is not None)

    def _target(self, item: Job) -> Path:
        if isinstance(item, TrainingJob):
            return checkpoint_path(self.grid.directory, item.task, item.seed)
        return self.store.path(item.prepared.task, item.method, item.prepared.seed)

    def _to_run(self, item: Job) -> Job | None:
        """Under its lock: what another run has done meanwhile is taken over, what a killed one left is removed."""
        path = self._target(item)
        if isinstance(item, EvaluationJob) and (record := self._found(item)) is not None:
            self._done(item, record, "cached" if record.status == "ok" else None)
            return None
        self.disk.check()
        if isinstance(item, EvaluationJob) and (error := self._foreseen(item)) is not None:
            self._done(item, self._written(item, failure_record(item, error)))
            return None
        for written in (path, path.with_suffix(".npz")):
            discard_leftovers(written)
        return replace(item, known=known_training(path)) if isinstance(item, TrainingJob) else item

    def _found(self, cell: EvaluationJob) -> Record | None:
        """The valid record of a cell.

        One of a skip or a failure counts where another run made it during this one, or where the cell has no more time
        now than was too little before.
        """
        place, path = cell.prepared, self._target(cell)
        record = self.store.valid(place.task, cell.method, place.seed, key=cell.key)
        if record is not None:
            return record
        record = self.store.read(place.task, cell.method, place.seed)
        if record is None or record.key != cell.key or record.status == "ok":
            return None
        is_new = _mark(path) != self.before.get(path)
        return record if is_new or self._is_out_of_time(record) else None

    def _is_out_of_time(self, record: Record) -> bool:
        limit = self.grid.workers.timeout
        return limit is not None and record.timeout is not None and limit <= record.timeout

    def _limit(self, item: Job) -> float | None:
        return self.grid.workers.timeout if isinstance(item, EvaluationJob) else None

    def _foreseen(self, cell: EvaluationJob) -> TimeLimitError | None:
        """Where another seed was out of time, it is not spent again; the seeds of a method are of one size."""
        seed, limit = self.too_slow.get((cell.prepared.task, cell.method)), self.grid.workers.timeout
        return None if seed is None or limit is None else TimeLimitError(limit, f"seed {seed}")

    def _started(self, item: Job) -> None:
        self.exclusive[self._target(item)] = self._is_exclusive()
        self._tell(item, "started")

    def _is_exclusive(self) -> bool:
        return self.grid.workers.exclusive and not self.claims.others()

    def _ended(self, item: Job, outcome: Outcome[TrainingResult | EvaluationResult]) -> None:
        if isinstance(item, TrainingJob):
            self._trained(item, outcome)
        elif isinstance(outcome, tuple):
            exclusive = self.exclusive[self._target(item)] and self._is_exclusive()
            self._done(item, self._written(item, _with_exclusive(outcome[0], exclusive=exclusive), outcome[1]))
        else:
            assert isinstance(outcome, Exception)
            self._done(item, self._written(item, failure_record(item, outcome)))

    def _trained(self, place: TrainingJob, outcome: Outcome[TrainingResult | EvaluationResult]) -> None:
        try:
            prepared = self._kept(place, outcome)
        except Exception as error:
            self._tell(place, "skipped" if isinstance(error, SKIP_ERRORS) else "failed", reason=_reason(error))
            self._fail_cells(place, error)
            return
        self._tell(place, "cached" if prepared.cached else "trained", seconds=prepared.training.seconds)
        for cell in self._cells(prepared):
            record = self._found(cell)
            if record is None:
                self.schedule.add(cell)
            else:
                self._done(cell, record, "cached" if record.status == "ok" else None)

    def _kept(self, place: TrainingJob, outcome: Outcome[TrainingResult | EvaluationResult]) -> TrainedModel:
        """Stage one with its weights written, and where to read them."""
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, TrainingResult)
        path = self._target(place)
        if outcome.content is not None:
            with self.disk.writing():
                write_bytes(path, outcome.content)
        has_weights = outcome.prepared.training.recipe is not None
        return replace(outcome.prepared, weights=self.executor.share(path) if has_weights else None)

    def _cells(self, prepared: TrainedModel) -> list[EvaluationJob]:
        methods = dict.fromkeys(self.grid.methods)
        return [
            EvaluationJob(prepared, method, self.grid.directory, self.grid.device, self.grid.tune_budget)
            for method in methods
        ]

    def _fail_cells(self, place: TrainingJob, error: Exception) -> None:
        """Without a network there is nothing to run. What is finished stays; a cell of another run is left to it."""
        unknown = TrainedModel(
            place.task, place.seed, key="", training=Training(seconds=None, recipe=None), cached=False
        )
        for cell in self._cells(unknown):
            record = failure_record(cell, error)
            kept = self.store.finished(place.task, cell.method, place.seed) is not None
            if not kept and self.claims.take(self._target(cell)):
                record = self._written(cell, record)
                self.claims.release(self._target(cell))
            self._done(cell, record)

    def _written(self, cell: EvaluationJob, record: Record, arrays: Arrays | None = None) -> Record:
        """The record on disk; where that cannot be, one of the failure, on disk if it is small enough to be."""
        try:
            with self.disk.writing():
                return self.store.write(record, arrays)
        except OSError as error:
            record = failure_record(cell, error)
            with suppress(OSError):
                record = self.store.write(record)
            return record

    def _done(self, item: EvaluationJob, record: Record, status: str | None = None) -> None:
        self.records[record.task, record.seed, record.method] = record
        if record.timeout is not None:
            self.too_slow.setdefault((record.task, record.method), record.seed)
        seconds = record.cost.fit_seconds + record.cost.predict_seconds if record.cost else None
        self._tell(item, status or record.status, seconds=seconds, reason=record.reason)

    def _tell(self, item: Job, status: str, *, seconds: float | None = None, reason: str | None = None) -> None:
        place, method = (item, None) if isinstance(item, TrainingJob) else (item.prepared, item.method)
        self.listener(Event(place.task, place.seed, method, status, seconds, reason))


def _with_exclusive(record: Record, *, exclusive: bool) -> Record:
    """The record with whether its cost was taken while nothing else of a grid ran."""
    if record.cost is None:
        return record
    return record.model_copy(update={"cost": record.cost.model_copy(update={"exclusive": exclusive})})


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _mark(path: Path) -> tuple[int, int] | None:
    """What tells one version of a file from the next: files are replaced, never changed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
