"""The grid task × method × seed: train each network once, evaluate every method on it, and keep what is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bdl_bench.methods import methods_named
from bdl_bench.plugins import loaded_plugins
from bdl_bench.records.predictions import Arrays
from bdl_bench.records.record import Record, RecordStore, Training
from bdl_bench.runner.devices import check_device
from bdl_bench.runner.directories import check_directory, make_directory
from bdl_bench.runner.disk import Disk
from bdl_bench.runner.evaluate_job import SKIP_ERRORS, EvaluationJob, EvaluationResult, Job, execute, failure_record
from bdl_bench.runner.events import Event, JobId, Listener
from bdl_bench.runner.executors import (
    ONE_WORKER,
    Executor,
    JobQueue,
    Outcome,
    TimeLimitError,
    Workers,
    check_workers,
    executor_for,
)
from bdl_bench.runner.locks import FileLocks
from bdl_bench.runner.schedule import Schedule
from bdl_bench.runner.train_job import TrainedModel, TrainingJob, TrainingResult, checkpoint_path, known_training
from bdl_bench.tasks import resolve_task
from estimators.errors import OptionError
from estimators.persistence.atomic import discard_leftovers, write_bytes

__all__ = ["Event", "Grid", "GridRun"]


@dataclass(frozen=True)
class Grid:
    """What to run: tasks, methods and seeds, and where.

    Args:
        tasks: names of tasks, or "module:factory".
        methods: names of methods.
        seeds: seeds of the problems, of training and of the methods.
        directory: where records and checkpoints are written.
        device: "cpu", "cuda", "cuda:1", ...
        workers: the executor, its jobs and threads, and the timeout.
        tune_budget: number of fits that each method may spend on its option; 0 tunes nothing, 1 calibrates the one fit.
        converged_map: whether each training is continued by full-batch L-BFGS to a stationary point of L,
            so that distances from the posterior do not depend on where the recipe stopped.

    Example:
        >>> from pathlib import Path
        >>> Grid(["diabetes"], ["map", "laplace"], [0, 1], Path("results")).n_jobs
        6
    """

    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    directory: Path
    device: str = "cpu"
    workers: Workers = ONE_WORKER
    tune_budget: int = 0
    converged_map: bool = False

    def check(self) -> None:
        """Raise OptionError for an unknown name or device, an impossible directory, workers or budget, or no job."""
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
            remedy = "0 for no tuning, 5 for five fits per method."
            raise OptionError("tune_budget >= 0", received=str(self.tune_budget), remedy=remedy)
        check_workers(self.workers)
        check_directory(self.directory)
        check_device(self.device, elsewhere=self.workers.name == "ray")

    @property
    def jobs(self) -> list[JobId]:
        """Return task, seed and method of every training (method None) and every evaluation, each once."""
        trainings = [(task, seed) for task in dict.fromkeys(self.tasks) for seed in dict.fromkeys(self.seeds)]
        evaluations = [(*training, method) for training in trainings for method in dict.fromkeys(self.methods)]
        return [*((*training, None) for training in trainings), *evaluations]

    @property
    def n_jobs(self) -> int:
        """Return the number of trainings and evaluations."""
        return len(self.jobs)

    def run(self, listener: Listener) -> list[Record]:
        """Run all jobs that are not done; return the record of every evaluation, in the order tasks, methods, seeds.

        The listener is called with each progress event. Several runs into one directory, of this machine or others,
        share the work. An exception, also KeyboardInterrupt, keeps what is done and ends the running jobs.

        Raises:
            OptionError: as `check`.
            FullDiskError: the disk has no room for the directory.
        """
        self.check()
        for job in self.jobs:
            listener(Event(*job, "planned"))
        with ExitStack() as stack:
            with Disk(self.directory).writing():
                make_directory(self.directory)
                locks = stack.enter_context(FileLocks(self.directory))
            executor = stack.enter_context(executor_for(self.workers, device=self.device))
            records = GridRun(self, listener, executor, locks).run()
        return [records[t, s, m] for t in self.tasks for m in self.methods for s in self.seeds]


class GridRun:
    """One run of a grid, with an executor and locks that have been entered.

    Evaluations of a network start once it is trained; only this process writes files.
    """

    def __init__(self, grid: Grid, listener: Listener, executor: Executor, locks: FileLocks) -> None:
        self.grid, self.listener, self.executor, self.locks = grid, listener, executor, locks
        self.store, self.disk = RecordStore(grid.directory), Disk(grid.directory)
        self.plugins = tuple(loaded_plugins())
        self.records: dict[JobId, Record] = {}
        self.exclusive: dict[Path, bool] = {}
        self.timed_out: dict[tuple[str, str], int] = {}
        """The first seed that reached the timeout, by task and method."""
        paths = (self.store.path(task, method, seed) for task, seed, method in grid.jobs if method is not None)
        self.versions_before = {path: _version(path) for path in paths}
        self.schedule: Schedule[Job] = Schedule(
            locks,
            self._target,
            prepare=self._prepare,
            failed=self._finish,
            waiting=lambda job: self._report(job, "waiting"),
        )

    def run(self) -> dict[JobId, Record]:
        """Return the records of all evaluations: found, made, or made by another run meanwhile."""
        for task, seed, method in self.grid.jobs:
            if method is None:
                converged = self.grid.converged_map
                self.schedule.add(TrainingJob(task, seed, self.grid.device, converged=converged, plugins=self.plugins))
        queue: JobQueue[Job] = JobQueue(self.schedule, self._started, self._timeout)
        with closing(self.executor.run(execute, queue)) as outcomes:
            for job, outcome in outcomes:
                self._finish(job, outcome)
                self.schedule.close(job)
        return self.records

    def _target(self, job: Job) -> Path:
        if isinstance(job, TrainingJob):
            return checkpoint_path(self.grid.directory, job.task, job.seed)
        return self.store.path(job.model.task, job.method, job.model.seed)

    def _prepare(self, job: Job) -> Job | None:
        """Return a locked job as it is to be run, or None if it is done; remove partial files of a killed run."""
        path = self._target(job)
        if isinstance(job, EvaluationJob) and (record := self._found(job)) is not None:
            self._record(job, record, "cached" if record.status == "ok" else None)
            return None
        self.disk.check()
        if isinstance(job, EvaluationJob) and (error := self._expected_timeout(job)) is not None:
            self._record(job, self._written(job, failure_record(job, error)))
            return None
        for written in (path, path.with_suffix(".npz")):
            discard_leftovers(written)
        return replace(job, known=known_training(path)) if isinstance(job, TrainingJob) else job

    def _found(self, job: EvaluationJob) -> Record | None:
        """Return the valid record of a job, if there is one.

        A record of a skip or failure is valid if another run made it during this one, or if the job reached its
        timeout before and has no more time now.
        """
        model, path = job.model, self._target(job)
        record = self.store.valid(model.task, job.method, model.seed, key=job.key)
        if record is not None:
            return record
        record = self.store.read(model.task, job.method, model.seed)
        if record is None or record.key != job.key or record.status == "ok":
            return None
        is_new, timeout = _version(path) != self.versions_before.get(path), self.grid.workers.timeout
        times_out = timeout is not None and record.timeout is not None and timeout <= record.timeout
        return record if is_new or times_out else None

    def _timeout(self, job: Job) -> float | None:
        return self.grid.workers.timeout if isinstance(job, EvaluationJob) else None

    def _expected_timeout(self, job: EvaluationJob) -> TimeLimitError | None:
        """Return an error if another seed reached the timeout, since all seeds of a method have the same size."""
        seed, timeout = self.timed_out.get((job.model.task, job.method)), self.grid.workers.timeout
        return None if seed is None or timeout is None else TimeLimitError(timeout, f"seed {seed}")

    def _started(self, job: Job) -> None:
        self.exclusive[self._target(job)] = self._is_exclusive()
        self._report(job, "started")

    def _is_exclusive(self) -> bool:
        return self.grid.workers.exclusive and not self.locks.has_other_runs()

    def _finish(self, job: Job, outcome: Outcome[TrainingResult | EvaluationResult]) -> None:
        if isinstance(job, TrainingJob):
            self._finish_training(job, outcome)
        elif isinstance(outcome, tuple):
            exclusive = self.exclusive[self._target(job)] and self._is_exclusive()
            self._record(job, self._written(job, _with_exclusive(outcome[0], exclusive=exclusive), outcome[1]))
        else:
            assert isinstance(outcome, Exception)
            self._record(job, self._written(job, failure_record(job, outcome)))

    def _finish_training(self, job: TrainingJob, outcome: Outcome[TrainingResult | EvaluationResult]) -> None:
        try:
            model = self._with_checkpoint(job, outcome)
        except Exception as error:
            status = "skipped" if isinstance(error, SKIP_ERRORS) else "failed"
            self._report(job, status, reason=f"{type(error).__name__}: {error}")
            self._fail_evaluations(job, error)
            return
        self._report(job, "cached" if model.cached else "trained", seconds=model.training.seconds)
        for evaluation in self._evaluations(model):
            record = self._found(evaluation)
            if record is None:
                self.schedule.add(evaluation)
            else:
                self._record(evaluation, record, "cached" if record.status == "ok" else None)

    def _with_checkpoint(self, job: TrainingJob, outcome: Outcome[TrainingResult | EvaluationResult]) -> TrainedModel:
        """Write the weights of a training, and return the model with where to read them."""
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, TrainingResult)
        path = self._target(job)
        if outcome.content is not None:
            with self.disk.writing():
                write_bytes(path, outcome.content)
        has_weights = outcome.model.training.recipe is not None
        return replace(outcome.model, weights=self.executor.share(path) if has_weights else None)

    def _evaluations(self, model: TrainedModel) -> list[EvaluationJob]:
        grid = self.grid
        methods = dict.fromkeys(grid.methods)
        options = grid.directory, grid.device, grid.tune_budget, self.plugins
        return [EvaluationJob(model, method, *options) for method in methods]

    def _fail_evaluations(self, job: TrainingJob, error: Exception) -> None:
        """Record the failed training for each method. Finished records, and those of another run, stay."""
        unknown = TrainedModel(job.task, job.seed, key="", training=Training(seconds=None, recipe=None), cached=False)
        for evaluation in self._evaluations(unknown):
            record = failure_record(evaluation, error)
            kept = self.store.finished(job.task, evaluation.method, job.seed) is not None
            if not kept and self.locks.acquire(self._target(evaluation)):
                record = self._written(evaluation, record)
                self.locks.release(self._target(evaluation))
            self._record(evaluation, record)

    def _written(self, job: EvaluationJob, record: Record, arrays: Arrays | None = None) -> Record:
        """Write a record; if the disk has no room, write the smaller one of that failure, or only return it."""
        try:
            with self.disk.writing():
                return self.store.write(record, arrays)
        except OSError as error:
            record = failure_record(job, error)
            with suppress(OSError):
                record = self.store.write(record)
            return record

    def _record(self, job: EvaluationJob, record: Record, status: str | None = None) -> None:
        self.records[record.task, record.seed, record.method] = record
        if record.timeout is not None:
            self.timed_out.setdefault((record.task, record.method), record.seed)
        seconds = record.cost.total_seconds if record.cost else None
        self._report(job, status or record.status, seconds=seconds, reason=record.reason)

    def _report(self, job: Job, status: str, *, seconds: float | None = None, reason: str | None = None) -> None:
        training, method = (job, None) if isinstance(job, TrainingJob) else (job.model, job.method)
        self.listener(Event(training.task, training.seed, method, status, seconds, reason))


def _with_exclusive(record: Record, *, exclusive: bool) -> Record:
    """Return the record with whether its cost was measured while no other job of a grid ran."""
    if record.cost is None:
        return record
    return record.model_copy(update={"cost": record.cost.model_copy(update={"exclusive": exclusive})})


def _version(path: Path) -> tuple[int, int] | None:
    """Return inode and time of a file, which differ between its versions: files are replaced, never changed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
