"""The methods on large networks: each is fitted and predicts the variance at three queries."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.large.models import MODELS, PRIOR_PRECISION
from estimators import FineTune, LinearizedLaplace, LinearResponse, Pointwise, PosteriorDraws, RegVar
from estimators.estimator.base import UncertaintyEstimator
from estimators.regvar.solvers import Solver

__all__ = ["METHODS", "N_DRAWS", "largest_output", "method_record"]

N_DRAWS = 8


def largest_output(f: Tensor) -> Tensor:
    """Return the output of the predicted class, (1,), of the outputs of one row."""
    return f.amax(-1, keepdim=True)


def _pointwise(model: nn.Module) -> UncertaintyEstimator:
    return RegVar(
        model,
        "classification",
        prior_precision=PRIOR_PRECISION,
        regularizer=Pointwise(of=largest_output),
        solver=LinearResponse(),
    )


def _exact(model: nn.Module) -> UncertaintyEstimator:
    return LinearizedLaplace(model, "classification", prior_precision=PRIOR_PRECISION, inverse="matrix_free_dual")


def _linear_response(model: nn.Module) -> UncertaintyEstimator:
    return _draws(model, solver=LinearResponse())


def _auto(model: nn.Module) -> UncertaintyEstimator:
    return _draws(model, solver="auto")


def _fine_tune(model: nn.Module) -> UncertaintyEstimator:
    return _draws(model)


def _fine_tune_other_draws(model: nn.Module) -> UncertaintyEstimator:
    return _draws(model, seed=1)


def _draws(model: nn.Module, *, solver: Solver | str | None = None, seed: int = 0) -> UncertaintyEstimator:
    regularizer = PosteriorDraws(N_DRAWS, seed=seed)
    return RegVar(
        model, "classification", prior_precision=PRIOR_PRECISION, regularizer=regularizer, solver=solver or FineTune()
    )


def _kron(model: nn.Module) -> UncertaintyEstimator:
    return LinearizedLaplace(model, "classification", prior_precision=PRIOR_PRECISION, hessian_structure="kron")


def _diag(model: nn.Module) -> UncertaintyEstimator:
    return LinearizedLaplace(model, "classification", prior_precision=PRIOR_PRECISION, hessian_structure="diag")


METHODS: dict[str, Callable[[nn.Module], UncertaintyEstimator]] = {
    "exact": _exact,
    "pointwise": _pointwise,
    "auto": _auto,
    "linear-response": _linear_response,
    "fine-tune": _fine_tune,
    "fine-tune-other-draws": _fine_tune_other_draws,
    "kron": _kron,
    "diag": _diag,
}


def method_record(name: str, method: str) -> dict[str, Any]:
    """Return the seconds of fit and variance, and the variance at the queries; training is not timed."""
    case = MODELS[name]()
    estimator = METHODS[method](case.model)
    start = time.perf_counter()
    estimator.fit(case.loader)
    fitted = time.perf_counter()
    variance = estimator.variance(case.queries)
    record: dict[str, Any] = {
        "fit_seconds": fitted - start,
        "variance_seconds": time.perf_counter() - fitted,
        "n_parameters": estimator.theta_.numel(),
        "variance": variance.tolist(),
    }
    if isinstance(estimator, RegVar):
        report = estimator.fit_report_
        record["passes"] = report.total_passes
        if report.a_norm_error is not None:
            record |= {"energy": report.a_norm_error.per_dimension, "block": report.rao_blackwell}
            record["standard_error"] = estimator.standard_error(case.queries).tolist()
            record |= {"stated": report.relative_error, "solver": estimator.solver_}
        elif report.solver is not None:
            record["passes"] = report.solver.passes
    return record
