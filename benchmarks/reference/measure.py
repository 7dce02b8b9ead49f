"""Measurement of a row: the reference posterior of a task, its convergence at every set, and its cost."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.metrics.fidelity import HALVES, fidelity, main_distance, noise_floor
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks import TASKS
from benchmarks.records import Measured
from estimators import ReferencePosterior
from estimators.errors import NotConvergedWarning

__all__ = ["HARD_CASES", "TASK_NAMES", "measure_hard_case", "measure_reference", "measure_two_runs"]

TASK_NAMES = ("toy-gap", "diabetes", "wine", "breast-cancer", "digits")
HARD_CASES = {"wine": 0.01, "digits": 0.1}
"""Prior precisions, by task, at which the chains mix much more slowly."""
_IN_FLOAT32 = ("digits",)
_HARD_BUDGET = 400_000


def measure_reference(task: str, seed: int) -> Measured:
    """Return the convergence and the cost of a task with its own prior precision."""
    return _measure(task, seed)


def measure_hard_case(task: str) -> Measured:
    """Return the convergence and the cost of a task with the prior precision of `HARD_CASES`."""
    return _measure(task, 0, prior_precision=HARD_CASES[task], max_gradients=_HARD_BUDGET)


def measure_two_runs(task: str) -> Measured:
    """Return the distance of two runs with chains from different seeds, and the noise floor of either, at every set."""
    torch.set_num_threads(1)
    problem = TASKS[task].problem(0)
    problem.model.eval()
    runs = [_posterior(task, problem, seed=seed) for seed in (0, 1000)]
    for run in runs:
        run.fit(problem.train)
    kind, found = problem.likelihood.kind, {}
    for name in _names(problem):
        x = _rows(problem, name)
        first, second = (_arrays(run, x) for run in runs)
        floors = [noise_floor(kind, arrays) for arrays in (first, second)]
        field = main_distance(kind)
        found[name] = {
            "field": field,
            "distance": getattr(fidelity(kind, first, second), field),
            "noise_floors": [getattr(floor, field) for floor in floors],
        }
    return {"sets": found, "gradients": [run.diagnostics_.n_gradients for run in runs]}


def _posterior(task: str, problem: Problem, **options: Any) -> ReferencePosterior:  # noqa: ANN401
    dtype = torch.float32 if task in _IN_FLOAT32 else torch.float64
    options = {"prior_precision": problem.prior_precision, "dtype": dtype, **options}
    return ReferencePosterior(problem.model, problem.likelihood, accept_unconverged=True, **options)


def _arrays(posterior: ReferencePosterior, x: Tensor) -> dict[str, NDArray[np.float64]]:
    """Return the predictions of a posterior, and those by half of its chains, by the names of a record."""
    found = {}
    predictions = [posterior.predict_uncalibrated(x), *posterior.half_predictions(x)]
    for prefix, prediction in zip(("", *(f"{half}_" for half in HALVES)), predictions, strict=True):
        found[f"{prefix}mean"] = prediction.mean
        found[f"{prefix}epistemic_variance"] = prediction.epistemic_variance
        if prediction.probs is not None:
            found[f"{prefix}probs"] = prediction.probs
    return {name: tensor.double().numpy() for name, tensor in found.items()}


def _measure(task: str, seed: int, **options: Any) -> Measured:  # noqa: ANN401
    torch.set_num_threads(1)
    problem = TASKS[task].problem(seed)
    problem.model.eval()  # the posterior does not depend on how the network is trained
    posterior = _posterior(task, problem, seed=seed, **options)
    start, processor = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        posterior.fit(problem.train)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor
    sets = {name: posterior.diagnose(_rows(problem, name)) for name in _names(problem)}
    return {
        "n_parameters": posterior.theta_.numel(),
        "n_chains": len(posterior.weight_draws_.weights),
        "collapsed": posterior.collapsed_,
        "dtype": str(posterior.dtype).removeprefix("torch."),
        "prior_precision": posterior.prior_precision,
        "reached": posterior.reached_,
        "failures": posterior.diagnostics_.failures(posterior.criteria),
        "fit": _finite(asdict(posterior.diagnostics_)),
        "sets": {name: _finite(asdict(found.rows)) for name, found in sets.items()},
        "set_failures": {
            name: found.failures(posterior.criteria, query=name != "test") for name, found in sets.items()
        },
        "seconds": seconds,
        "processor_seconds": processor_seconds,
    }


def _names(problem: Problem) -> list[str]:
    """Return the names of the test set, of out-of-distribution sets, and of the mildest and the worst shifts."""
    names = [name for name in problem.sets() if name == "test" or name.startswith("ood")]
    return names + [name for name in problem.sets() if name.startswith("shift") and name.endswith(("-1", "-5"))]


def _rows(problem: Problem, name: str) -> Tensor:
    return torch.cat([batch[0] if isinstance(batch, (tuple, list)) else batch for batch in problem.sets()[name]])


def _finite(values: Any) -> Any:  # noqa: ANN401
    """Return nested numbers with None in place of infinite ones, which JSON has not."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values
