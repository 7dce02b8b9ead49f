"""Tuning on validation rows, with the same protocol and the same number of fits for every method."""

from __future__ import annotations

import warnings

from bdl_bench.methods import Method
from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator
from estimators.calibration.grid import COARSE_GRID
from estimators.errors import TuningBoundaryWarning
from estimators.tuning import Tuned, tune

__all__ = ["tune_method"]


def tune_method(
    estimator: UncertaintyEstimator, method: Method, problem: Problem, *, n: int
) -> Tuned[UncertaintyEstimator] | None:
    """Tune a fitted estimator on the validation rows.

    Values at the boundary of a range are in the record, so they raise no warning.

    Args:
        estimator: the fitted estimator.
        method: its method, which names the option and its values.
        problem: the problem.
        n: number of fits, the given one included. For n = 1, and for a method without an option to tune, only the
            predictions are calibrated.

    Returns:
        The tuned estimator; None for n = 0.
    """
    if n == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningBoundaryWarning)
        option = method.tuned_option
        values = [] if n == 1 or option is None else option.values(problem, n)
        name = None if option is None or not values else option.option
        return tune(estimator, problem.validation, option=name, values=values or None, grid=COARSE_GRID)
