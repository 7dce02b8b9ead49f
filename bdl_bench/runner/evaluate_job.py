"""Stage two of the grid, one cell: fit a method on a prepared problem, predict its test rows, score and record."""

from __future__ import annotations

import dataclasses
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bdl_bench.data.folder import MissingDataError
from bdl_bench.methods import METHODS, Method
from bdl_bench.methods.custom_methods import as_estimator
from bdl_bench.methods.registry import refuse_without_recipe
from bdl_bench.metrics import evaluate
from bdl_bench.metrics.array_checks import check_arrays
from bdl_bench.problem.kept_rows import AS_GIVEN
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import rewind
from bdl_bench.records.content_digests import content_digest
from bdl_bench.records.predictions import Arrays, Predictor, prefixed
from bdl_bench.records.record import Cost, Record, Tuning, content_key
from bdl_bench.records.versions import environment
from bdl_bench.runner.executors.worker_errors import TimeLimitError
from bdl_bench.runner.peak_memory import peak_memory
from bdl_bench.runner.preflight import preflight
from bdl_bench.runner.train_job import TrainedModel, load_checkpoint, load_problem
from bdl_bench.runner.tuning import tuned
from bdl_bench.tasks import resolve_task
from estimators import UncertaintyEstimator
from estimators.errors import (
    IndefiniteHessianError,
    NoLastLayerError,
    NotConvergedWarning,
    TooLargeError,
    UnsupportedError,
)
from estimators.runtime.rng import seeded
from estimators.tuning import Tuned

__all__ = ["SKIP_ERRORS", "EvaluationJob", "EvaluationResult", "evaluate_job", "failure_record"]

EvaluationResult: TypeAlias = tuple[Record, Arrays | None]
"""A record and its arrays, written by who asked for them."""

SKIP_ERRORS = (
    IndefiniteHessianError,
    MissingDataError,
    NoLastLayerError,
    TimeLimitError,
    TooLargeError,
    UnsupportedError,
)
"""What is raised where a method has no answer for a network, or none in time, or a task has no data here."""


@dataclass(frozen=True)
class EvaluationJob:
    """One method on one prepared (task, seed)."""

    prepared: TrainedModel
    method: str
    directory: Path
    device: str
    tune_budget: int = 0

    @property
    def key(self) -> str:
        """The content key of the record that this cell makes."""
        return content_key(problem=self.prepared.key, method=self.method, code=self.code, tune_budget=self.tune_budget)

    @property
    def code(self) -> str:
        """A digest of the method: its options by value, its code, and the user's modules that this imports.

        It is computed anew in each process, from what is loaded there.
        """
        method = METHODS[self.method]
        return content_digest(method.build, method.axis, method.retrains)


def evaluate_job(cell: EvaluationJob) -> EvaluationResult:
    """The record of a cell and its arrays; without them where it raised."""
    try:
        return _measured(cell)
    except Exception as error:
        return failure_record(cell, error), None


def failure_record(cell: EvaluationJob, error: BaseException) -> Record:
    """The record of a cell that raised: skipped, with the reason, where it cannot run here, else failed."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, SKIP_ERRORS):
        limit = error.seconds if isinstance(error, TimeLimitError) else None
        return _blank(cell, status="skipped", reason=reason, timeout=limit)
    return _blank(cell, status="failed", reason=reason, traceback="".join(traceback.format_exception(error)))


def _measured(cell: EvaluationJob) -> EvaluationResult:
    problem, method = _problem(cell), METHODS[cell.method]
    if method.retrains:
        refuse_without_recipe(method.name, problem)
    rewind(problem.sets().values())
    before = preflight(problem)
    rewind(problem.sets().values())
    with seeded(cell.prepared.seed), _collected_warnings("warnings") as warned:
        predictor, test, cost = _fitted(cell, method, problem)
        arrays, estimator = test | predictor.other_sets(), predictor.estimator
    with seeded(cell.prepared.seed), _collected_warnings("warnings of tuning") as warned_too:
        tuning = tuned(estimator, method, problem, n=cell.tune_budget)
        again = {} if tuning is None else Predictor(problem, tuning.estimator, tuning.predict).everywhere()
    kind = problem.likelihood.kind
    check_arrays(arrays)
    check_arrays(prefixed("tuned", again))
    record = _blank(
        cell,
        status="ok",
        kind=kind,
        metrics=evaluate(kind, arrays),
        tuned=evaluate(kind, again) if again else {},
        tuning=None if tuning is None else Tuning(**tuning.to_dict()),
        cost=_with_tuning(cost, estimator, tuning),
        training=cell.prepared.training,
        configuration=_configuration(cell, problem, estimator, n_test=len(test["targets"])),
        fit_report=_fit_report(estimator) | warned | warned_too,
        preflight=before,
    )
    return record, arrays | prefixed("tuned", again)


def _fitted(cell: EvaluationJob, method: Method, problem: Problem) -> tuple[Predictor, Arrays, Cost]:
    """A method fitted, what it says of the test rows, and what both took."""
    with peak_memory(cell.device) as memory:
        unfitted = as_estimator(method.build(problem, cell.prepared.seed), problem)
        start = time.perf_counter()
        estimator = unfitted.fit(problem.train)
        fitted, passes = _now(cell.device), estimator.passes_
        predictor = Predictor(problem, estimator, estimator.predict)
        test = predictor.test()
        predicted = _now(cell.device)
    known = estimator.counts_passes
    cost = Cost(
        fit_seconds=fitted - start,
        predict_seconds=predicted - fitted,
        peak_bytes=memory.peak_bytes,
        peak_increase_bytes=memory.increase_bytes,
        peak_reset=memory.reset,
        device_peak_bytes=memory.device_peak_bytes,
        passes=passes if known else None,
        predict_passes=estimator.passes_ - passes if known else None,
    )
    return predictor, test, cost


def _with_tuning(cost: Cost, estimator: UncertaintyEstimator, tuning: Tuned[UncertaintyEstimator] | None) -> Cost:
    if tuning is None:
        return cost
    passes = tuning.passes if estimator.counts_passes else None
    return cost.model_copy(update={"tuning_seconds": tuning.seconds, "tuning_passes": passes})


@contextmanager
def _collected_warnings(name: str) -> Iterator[dict[str, str]]:
    """What did not converge inside the block, as one entry of a record; other warnings go where they would."""
    found: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NotConvergedWarning)
        yield found
    ours = [w for w in caught if issubclass(w.category, NotConvergedWarning)]
    if ours:
        texts = dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in ours)
        found[name] = " | ".join(texts)
    for other in (w for w in caught if w not in ours):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


_LAST: dict[tuple[str, Path, str], Problem] = {}


def _problem(cell: EvaluationJob) -> Problem:
    """The problem of the cell, its weights as stage one left them; the last one of this process is kept."""
    key = (cell.prepared.key, cell.directory, cell.device)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = load_problem(cell.prepared, cell.directory, cell.device)
    elif _LAST[key].trains_model:
        load_checkpoint(_LAST[key], cell.prepared, cell.directory)
    return _LAST[key]


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _configuration(
    cell: EvaluationJob, problem: Problem, estimator: UncertaintyEstimator, *, n_test: int
) -> dict[str, str]:
    return {
        "likelihood": repr(problem.likelihood),
        "prior_precision": repr(problem.prior_precision),
        "parameters": str(problem.n_parameters),
        "train_rows": str(estimator.n_data_),
        "test_rows": str(n_test),
        "dtype": str(next(problem.model.parameters()).dtype).removeprefix("torch."),
        "device": cell.device,
        "threads": str(torch.get_num_threads()),
        "tune_budget": str(cell.tune_budget),
        "row_order": _row_orders(problem),
    }


def _row_orders(problem: Problem) -> str:
    """In which order the rows of each set came to the method, where that is not the loader's own."""
    orders = [f"{name}: {order}" for name, order in problem.row_orders().items() if order != AS_GIVEN]
    return "; ".join(orders) or AS_GIVEN


def _fit_report(estimator: UncertaintyEstimator) -> dict[str, str]:
    """What the fit says of itself: its report, and every learned attribute that is a plain value."""
    report = getattr(estimator, "fit_report_", None) or {}
    if dataclasses.is_dataclass(report) and not isinstance(report, type):
        report = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    values: dict[str, Any] = dict(report) if isinstance(report, Mapping) else {"report": report}
    learned = {name: value for name, value in vars(estimator).items() if name.endswith("_") and name[0] != "_"}
    learned.pop("fit_report_", None)
    learned |= getattr(estimator, "method_report_", {})  # of a plain class
    merged = {**learned, **values}
    return {name: _plain(value) for name, value in merged.items() if isinstance(value, (str, bool, int, float))}


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _blank(cell: EvaluationJob, **fields: Any) -> Record:  # noqa: ANN401
    return Record(
        key=cell.key,
        task=cell.prepared.task,
        task_summary=resolve_task(cell.prepared.task).summary,
        method=cell.method,
        method_summary=METHODS[cell.method].summary,
        seed=cell.prepared.seed,
        problem=cell.prepared.key,
        task_code=cell.prepared.code,
        method_code=cell.code,
        environment=environment(),
        **fields,
    )
