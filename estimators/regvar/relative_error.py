"""An estimate of the relative error of a variance from posterior draws."""

from __future__ import annotations

import math

import torch

from estimators.objective.objective import Objective
from estimators.regvar.a_norm_error import ANormError
from estimators.regvar.exact_draws import ExactDraws
from estimators.regvar.measured_bounds import MeasuredBounds
from estimators.regvar.monte_carlo import MonteCarloVariance
from estimators.regvar.probe_rows import random_training_rows

__all__ = ["relative_error"]

_ROWS = 16
"""Training rows over which the standard error is averaged."""


def relative_error(estimate: MonteCarloVariance, objective: Objective, a_norm_error: ANormError | None) -> float:
    """Return the root mean square of the relative error of the variance over rows and outputs.

    MeasuredBounds has measured it, and adds the round-off of an ill-conditioned A; ExactDraws has only the latter. For
    other estimates it is √(s² + e²), with the relative Monte Carlo standard error s at random training rows, and the
    A-norm error e per dimension, the solver's part of the relative error.

    Args:
        estimate: the variance estimate.
        objective: the objective, with the training rows.
        a_norm_error: error of the draws, or None.
    """
    if isinstance(estimate, MeasuredBounds):
        return estimate.accuracy.total_error
    if isinstance(estimate, ExactDraws):
        return estimate.round_off
    rows = random_training_rows(objective, _ROWS, torch.Generator().manual_seed(0))
    tiny = torch.finfo(objective.theta.dtype).tiny
    ratios = torch.cat([(estimate.standard_error(x) / estimate.variance(x).clamp_min(tiny)).flatten() for x in rows])
    solver = 0.0 if a_norm_error is None else a_norm_error.clipped
    return math.hypot(float(ratios.double().square().mean().sqrt()), solver)
