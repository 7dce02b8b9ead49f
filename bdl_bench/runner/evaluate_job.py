"""Evaluation jobs: fit a method on a problem, predict its rows, compute the metrics and make a record.

Executing a job returns a value; only the process of the grid writes files.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bdl_bench.data.folder import MissingDataError
from bdl_bench.decisions import Learner, Networks, run_decision
from bdl_bench.methods import METHODS, Method
from bdl_bench.methods.custom_methods import as_estimator, learned_values
from bdl_bench.methods.registry import check_recipe
from bdl_bench.metrics import Metric, evaluate
from bdl_bench.plugins import origin_of_method, origin_of_task, own_metrics, require_plugins
from bdl_bench.problem.kept_rows import AS_GIVEN
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import rewind
from bdl_bench.records.content_digests import content_digest
from bdl_bench.records.predictions import Arrays, Predictor, check_arrays, prefixed
from bdl_bench.records.record import Cost, OwnMetric, Record, Tuning, content_key
from bdl_bench.records.versions import environment
from bdl_bench.runner.executors.worker_errors import TimeLimitError
from bdl_bench.runner.peak_memory import peak_memory
from bdl_bench.runner.preflight import preflight, relative_gradient
from bdl_bench.runner.train_job import (
    TrainedModel,
    TrainingJob,
    TrainingResult,
    load_checkpoint,
    load_problem,
    train_network,
)
from bdl_bench.tasks import resolve_task
from estimators import UncertaintyEstimator
from estimators.calibration.grid import COARSE_GRID
from estimators.errors import (
    IndefiniteHessianError,
    NoLastLayerError,
    NotConvergedWarning,
    ReferenceNotReachedError,
    TooLargeError,
    TuningBoundaryWarning,
    UnsupportedError,
)
from estimators.runtime.rng import seeded
from estimators.tuning import Tuned, shrinkage_of_few_rows, tune

__all__ = ["SKIP_ERRORS", "EvaluationJob", "EvaluationResult", "Job", "evaluate_job", "execute", "failure_record"]

EvaluationResult: TypeAlias = tuple[Record, Arrays | None]
"""A record and its arrays, written by the process of the grid."""

SKIP_ERRORS = (
    IndefiniteHessianError,
    MissingDataError,
    NoLastLayerError,
    ReferenceNotReachedError,
    TimeLimitError,
    TooLargeError,
    UnsupportedError,
)
"""Errors that mean a method cannot run on a network, not in time, or not without missing data: the run is skipped."""


@dataclass(frozen=True)
class EvaluationJob:
    """One method on one trained (task, seed), with the number of fits that it may spend on its option.

    `plugins` are loaded where it runs.
    """

    model: TrainedModel
    method: str
    directory: Path
    device: str
    tune_budget: int = 0
    plugins: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Return the content key of the record that this job makes."""
        return content_key(problem=self.model.key, method=self.method, code=self.code, tune_budget=self.tune_budget)

    @property
    def code(self) -> str:
        """Return a digest of the method: its options by value, its code, and the user modules that this imports.

        Each process computes it from what is loaded there.
        """
        method = METHODS[self.method]
        return content_digest(method.build, method.tuned_option, method.retrains)


Job: TypeAlias = TrainingJob | EvaluationJob


def execute(job: Job) -> TrainingResult | EvaluationResult:
    """Train a network, or evaluate a method on it."""
    import bdl_bench.runner.warm_up  # noqa: F401  only in processes that execute jobs

    require_plugins(job.plugins)

    return train_network(job) if isinstance(job, TrainingJob) else evaluate_job(job)


def evaluate_job(job: EvaluationJob) -> EvaluationResult:
    """Return the record and the arrays of a job; if it raises, the record of the failure and None."""
    try:
        return _evaluate(job)
    except Exception as error:
        return failure_record(job, error), None


def failure_record(job: EvaluationJob, error: BaseException) -> Record:
    """Return the record of a job that raised: skipped for `SKIP_ERRORS`, else failed with the traceback."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, SKIP_ERRORS):
        timeout = error.seconds if isinstance(error, TimeLimitError) else None
        return _record(job, status="skipped", reason=reason, timeout=timeout)
    return _record(job, status="failed", reason=reason, traceback="".join(traceback.format_exception(error)))


def _evaluate(job: EvaluationJob) -> EvaluationResult:
    problem, method = _problem(job), METHODS[job.method]
    if method.retrains:
        check_recipe(method.name, problem)
    rewind(problem.sets().values())
    findings, gradient = preflight(problem), relative_gradient(problem)
    rewind(problem.sets().values())
    with seeded(job.model.seed), _collected_warnings("warnings") as fit_warnings:
        final, curves = _after_decision(job, method, problem)
        predictor, test, cost = _fit_and_predict(job, method, final)
        arrays, estimator = test | predictor.other_sets(), predictor.estimator
        arrays |= prefixed("decision", curves)
    with seeded(job.model.seed), _collected_warnings("warnings of tuning") as tuning_warnings:
        tuning = None if problem.pool is not None else _tuned(job, estimator, final)
        tuned_arrays = {}
        if tuning is not None:
            tuned_arrays = Predictor(
                final, tuning.estimator, tuning.predict_standardized, tuning.calibration
            ).all_sets()
    kind = problem.likelihood.kind
    check_arrays(arrays)
    check_arrays(prefixed("tuned", tuned_arrays))
    record = _record(
        job,
        status="ok",
        kind=kind,
        metrics=evaluate(kind, arrays),
        tuned=evaluate(kind, tuned_arrays) if tuned_arrays else {},
        own_metrics={key: _own(metric) for key, (metric, _) in own_metrics(kind).items()},
        plugins=_plugins(job) | {f"metric {key}": origin for key, (_, origin) in own_metrics(kind).items()},
        tuning=None if tuning is None else Tuning(**tuning.to_dict()),
        cost=_with_tuning(cost, estimator, tuning),
        training=job.model.training,
        configuration=_configuration(job, problem, final, estimator, n_test=len(test["targets"])),
        fit_report=_fit_report(estimator) | fit_warnings | tuning_warnings,
        preflight=findings,
        relative_gradient=gradient,
    )
    return record, arrays | prefixed("tuned", tuned_arrays)


def _after_decision(job: EvaluationJob, method: Method, problem: Problem) -> tuple[Problem, Arrays]:
    """Return the problem at the end of its decision's loop and the curves of that; itself and none without one.

    Raises UnsupportedError for a network whose training was continued, which a loop does not repeat.
    """
    if problem.decision is None:
        return problem, {}
    if job.model.training.convergence is not None:
        raise UnsupportedError(
            "a task without a decision for converged_map",
            received=f"{job.model.task}, whose loop trains every network by the recipe",
            remedy="compare this task in another directory, without converged_map.",
        )
    outcome = run_decision(Learner(problem, method.build, job.model.seed, _NETWORKS))
    return outcome.problem.kept(), outcome.arrays


def _fit_and_predict(job: EvaluationJob, method: Method, problem: Problem) -> tuple[Predictor, Arrays, Cost]:
    """Return the fitted method as a predictor, the arrays of the test rows, and the cost of both."""
    with peak_memory(job.device) as memory:
        unfitted = as_estimator(method.build(problem, job.model.seed), problem)
        start = time.perf_counter()
        estimator = unfitted.fit(problem.train)
        fitted, passes = _now(job.device), estimator.passes_
        predictor = Predictor(problem, estimator, estimator.predict_uncalibrated)
        test = predictor.test()
        predicted = _now(job.device)
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


def _tuned(job: EvaluationJob, estimator: UncertaintyEstimator, problem: Problem) -> Tuned[UncertaintyEstimator] | None:
    """Tune a fitted estimator on the validation rows, by the same protocol for every method; None for no budget.

    With a budget of 1, and for a method without an option to tune, only the predictions are calibrated. Values at the
    boundary of a range are in the record, so they raise no warning.
    """
    n, option = job.tune_budget, METHODS[job.method].tuned_option
    if n == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningBoundaryWarning)
        values = [] if n == 1 or option is None else option.values(problem, n)
        name = None if option is None or not values else option.option
        shrinkage = shrinkage_of_few_rows(problem.likelihood.kind)
        validation, given = problem.validation, values or None
        return tune(estimator, validation, option=name, values=given, grid=COARSE_GRID, shrinkage=shrinkage)


def _with_tuning(cost: Cost, estimator: UncertaintyEstimator, tuning: Tuned[UncertaintyEstimator] | None) -> Cost:
    if tuning is None:
        return cost
    passes = tuning.passes if estimator.counts_passes else None
    return cost.model_copy(update={"tuning_seconds": tuning.seconds, "tuning_passes": passes})


@contextmanager
def _collected_warnings(name: str) -> Iterator[dict[str, str]]:
    """Yield a mapping that has the block's convergence warnings as one text at its end; repeat other warnings."""
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
"""The last problem of this process, since the jobs of one problem mostly follow each other."""
_NETWORKS: Networks = {}
"""Networks of the last problem on rows that all methods query."""


def _problem(job: EvaluationJob) -> Problem:
    """Return the problem of a job with the weights of its training job."""
    key = (job.model.key, job.directory, job.device)
    if key not in _LAST:
        _LAST.clear()
        _NETWORKS.clear()
        _LAST[key] = load_problem(job.model, job.directory, job.device)
    elif _LAST[key].trains_model:
        load_checkpoint(_LAST[key], job.model, job.directory)
    return _LAST[key]


def _now(device: str) -> float:
    """Return the seconds of the clock once the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _configuration(
    job: EvaluationJob, problem: Problem, final: Problem, estimator: UncertaintyEstimator, *, n_test: int
) -> dict[str, str]:
    decision = {} if problem.decision is None else {"decision": repr(problem.decision)}
    if problem.pool is not None:
        decision["tuning"] = "none, since labels of validation rows would be labels that no method asked for"
    return decision | {
        "likelihood": repr(problem.likelihood),
        "prior_precision": repr(problem.prior_precision),
        "parameters": str(problem.n_parameters),
        "train_rows": str(estimator.n_data_),
        "test_rows": str(n_test),
        "dtype": str(next(problem.model.parameters()).dtype).removeprefix("torch."),
        "device": job.device,
        "threads": str(torch.get_num_threads()),
        "tune_budget": str(job.tune_budget),
        "row_order": _row_orders(final),
    }


def _row_orders(problem: Problem) -> str:
    """Return the order in which a method gets the rows of each set, if it differs from that of the loader."""
    orders = [f"{name}: {order}" for name, order in problem.order_descriptions().items() if order != AS_GIVEN]
    return "; ".join(orders) or AS_GIVEN


def _fit_report(estimator: UncertaintyEstimator) -> dict[str, str]:
    """Return the report of a fit and its learned attributes, as far as they are plain values."""
    items = learned_values(estimator) | getattr(estimator, "method_report_", {})  # of a custom class
    return {name: _plain(value) for name, value in items.items() if isinstance(value, (str, bool, int, float))}


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plugins(job: EvaluationJob) -> dict[str, str]:
    """Return the plugins that the task and the method came from."""
    found = {"task": origin_of_task(job.model.task), "method": origin_of_method(job.method)}
    return {name: origin for name, origin in found.items() if origin is not None}


def _own(metric: Metric) -> OwnMetric:
    return OwnMetric(label=metric.label, reading=metric.reading, better=metric.better, relevant=metric.relevant)


def _record(job: EvaluationJob, **fields: Any) -> Record:  # noqa: ANN401
    return Record(
        key=job.key,
        task=job.model.task,
        task_summary=resolve_task(job.model.task).summary,
        method=job.method,
        method_summary=METHODS[job.method].summary,
        seed=job.model.seed,
        problem=job.model.key,
        task_code=job.model.code,
        method_code=job.code,
        environment=environment(),
        **({"plugins": _plugins(job)} | fields),
    )
