"""The tuning of a cell: the same protocol and the same number of fits for every method."""

from __future__ import annotations

import warnings

from bdl_bench.methods import Method
from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator
from estimators.errors import TuningBoundaryWarning
from estimators.tuning import CalibrationGrid, Tuned, tune

__all__ = ["tuned"]

_GRID = CalibrationGrid(
    variance_scales=(0.0, *(10.0**k for k in range(-4, 7))),
    softmax_temperatures=tuple(10 ** (k / 3) for k in range(-3, 4)),
    noise_factors=tuple(10 ** (k / 3) for k in range(-3, 4)),
)
"""Coarse, and refined about its best point, so that a record stays small; up to 10⁶ for what has no level, as SWAG."""


def tuned(
    estimator: UncertaintyEstimator, method: Method, problem: Problem, *, n: int
) -> Tuned[UncertaintyEstimator] | None:
    """A fitted estimator tuned on the validation rows with n fits, the given one among them; None for n = 0.

    For n = 1, and for a method that has no axis, only its predictions are calibrated. What ends at the edge of a range
    is in the record, and so is no warning.
    """
    if n == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningBoundaryWarning)
        values = [] if n == 1 or method.tuned_option is None else method.tuned_option.values(problem, n)
        if method.tuned_option is None or not values:
            return tune(estimator, problem.validation, option=None, grid=_GRID)
        return tune(estimator, problem.validation, option=method.tuned_option.option, values=values, grid=_GRID)
