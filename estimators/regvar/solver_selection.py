"""solver="auto": which solver fits the regularizer, the objective and the memory."""

from __future__ import annotations

from estimators.objective.objective import Objective
from estimators.regvar.regularizers import PosteriorDraws, Regularizer
from estimators.regvar.solvers import FineTune, LinearResponse, Solver
from estimators.regvar.solvers.dense_response import DenseResponse
from estimators.regvar.solvers.to_tolerance import LinearResponseToTolerance

__all__ = ["select_solver"]

_VECTORS_PER_DRAW = 6
"""Vectors of θ's size per draw in the smallest solve: two blocks of the space, solution, product, ξ and start."""


def select_solver(
    objective: Objective, regularizer: Regularizer, *, rtol: float, centred: bool = True
) -> tuple[Solver, str]:
    """Select the solver for solver="auto".

    Args:
        objective: the objective to refit.
        regularizer: the regularizer.
        rtol: relative error of the variance to reach.
        centred: whether the objective is centred at θ̂.

    Returns:
        The solver, and the reason in words.
    """
    if not centred:
        return FineTune(), "centred=False refits the trained loss, which LinearResponse cannot"
    if not isinstance(regularizer, PosteriorDraws):
        return LinearResponse(), f"{type(regularizer).__name__} needs accurate solutions, not a space"
    if not regularizer.has_bounds(objective):
        why = "some prior_precision is 0" if regularizer.variance_estimate == "auto" else "of variance_estimate"
        return LinearResponse(), f"no bounds of the variance to measure an error with, since {why}"
    if DenseResponse.suits(objective):
        return DenseResponse(rtol, regularizer.seed), "so few parameters and outputs that a dense A takes less time"
    if LinearResponseToTolerance.fits(objective, regularizer.n_draws):
        return LinearResponseToTolerance(rtol, regularizer.seed), "a Krylov space that can be measured fits into memory"
    theta = objective.theta
    needed = _VECTORS_PER_DRAW * regularizer.n_draws * theta.numel() * theta.element_size()
    if needed <= objective.available_bytes():
        return LinearResponse(), "the Krylov space that fits into memory is too small to reach and measure rtol"
    return FineTune(), "no Krylov space fits into memory"
