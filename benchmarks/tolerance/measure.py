"""Measurement of a row: RegVar with its defaults at several tolerances, compared with the exact GGN variance."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bdl_bench.problem.problem import Problem
from bdl_bench.tasks import TASKS
from benchmarks.records import Measured
from estimators import LinearizedLaplace, RegVar
from estimators.errors import NotConvergedWarning

__all__ = ["RTOLS", "TASK_NAMES", "measure_tolerance"]

TASK_NAMES = ("diabetes", "diabetes-gap", "wine", "breast-cancer", "toy-gap", "digits", "digits-ood", "digits-cnn")
RTOLS = (0.2, 0.05, 0.01)
_ROWS = 300
_OUTLIERS = ("ood", "shift")
_ROUND_OFF = {torch.float64: 1e-9, torch.float32: 3e-4}
"""Relative distance by which the exact variance may lie outside the bounds: the round-off of both."""


def measure_tolerance(task: str, seed: int) -> Measured:
    """Return the true and the stated errors, the cost, and the AUROC for each tolerance."""
    torch.set_num_threads(1)
    problem = TASKS[task].problem(seed)
    options: dict[str, Any] = {"prior_precision": problem.prior_precision}
    exact = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.train)
    sets = {name: rows for name in problem.sets() if (rows := _rows(problem, name)) is not None}
    truth = {name: exact.variance(x).double().flatten(1) for name, x in sets.items()}
    points = []
    for rtol in RTOLS:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            regvar = RegVar(problem.model, problem.likelihood, rtol=rtol, **options).fit(problem.train)
        seconds = time.perf_counter() - start
        assert regvar.fit_report_.solver is not None
        found = {name: regvar.variance(x).double().flatten(1) for name, x in sets.items()}
        points.append(
            {
                "rtol": rtol,
                "relative_error": regvar.relative_error_,
                "errors": {name: _relative_rmse(found[name], truth[name]) for name in sets},
                "products": regvar.fit_report_.solver.passes,
                "passes": regvar.fit_report_.total_passes,
                "seconds": seconds,
                "outside": sum(_outside(regvar, x, truth[name]) for name, x in sets.items()),
                "auroc": {name: _auroc(found, name) for name in sets if name.startswith("ood")},
                "exact_auroc": {name: _auroc(truth, name) for name in sets if name.startswith("ood")},
            }
        )
    return {"points": points, "n_parameters": problem.n_parameters, "rows": sum(map(len, sets.values()))}


def _rows(problem: Problem, name: str) -> Tensor | None:
    """Return at most 300 random rows of a set; None for sets of other than test, OOD and shifted rows."""
    if name != "test" and not name.startswith(_OUTLIERS):
        return None
    x = torch.cat([batch[0] if isinstance(batch, (tuple, list)) else batch for batch in problem.sets()[name]])
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_ROWS]]


def _relative_rmse(found: Tensor, truth: Tensor) -> float:
    return float((found / truth - 1).square().mean().sqrt())


def _outside(regvar: RegVar, x: Tensor, truth: Tensor) -> int:
    """Return the number of outputs whose exact variance is outside the bounds."""
    lower, upper = (bound.double().flatten(1) for bound in regvar.variance_bounds(x))
    slack = _ROUND_OFF[x.dtype]
    return int(((lower > truth * (1 + slack)) | (upper < truth * (1 - slack))).sum())


def _auroc(variance: dict[str, Tensor], name: str) -> float:
    """Return the AUROC of the mean variance over outputs, for the rows of a set against test rows."""
    scores = torch.cat([variance["test"].mean(1), variance[name].mean(1)])
    labels = torch.cat([torch.zeros(len(variance["test"])), torch.ones(len(variance[name]))])
    return float(roc_auc_score(labels, scores))
