"""The report of a RegVar fit: whether θ̂ is stationary, whether the draws converged, and what the fit cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from estimators.estimator.fit_report import FitReport
from estimators.models.self_check import DerivativeReport
from estimators.objective.objective import Objective
from estimators.regvar.a_norm_error import ANormError
from estimators.regvar.solvers.base import SolverReport

__all__ = ["RegVarReport", "relative_gradient", "relative_to_prior"]


@dataclass(frozen=True, kw_only=True)
class RegVarReport(FitReport):
    """Diagnostics and cost of a RegVar fit.

    Args:
        relative_gradient: ‖∇L(θ̂)‖ / ‖δ(θ̂ − θ₀)‖: 0 at a stationary point, about 1 far from it. Centred objectives are
            right at any value.
        solver: report of the last solve, or None if nothing was solved in `fit`.
        a_norm_error: A-norm error of posterior draws, or None for other regularizers.
        selection: why this solver was selected, or that it was given.
        relative_error: estimate of the relative root-mean-square error of the variance; None for other regularizers.
        rao_blackwell: which layer posterior draws are Rao-Blackwellised over, or why over none.
        passes: cost of `fit` per function r_k (per draw), by phase, in epoch equivalents (forward and backward passes
            over the training rows). All rows count, from the first check of the data on; the cost of each operation
            is in `estimators.runtime.pass_counter`.
    """

    relative_gradient: float
    solver: SolverReport | None = None
    a_norm_error: ANormError | None = None
    selection: str = ""
    relative_error: float | None = None
    rao_blackwell: str | None = None

    @classmethod
    def restored(cls, content: dict[str, Any]) -> RegVarReport:
        """Return the report from the dict of its fields, as `dataclasses.asdict` makes it."""
        solver, a_norm_error, derivatives = content["solver"], content["a_norm_error"], content.get("derivatives")
        parts = {
            "derivatives": None if derivatives is None else DerivativeReport(**derivatives),
            "solver": None if solver is None else SolverReport(**solver),
            "a_norm_error": None if a_norm_error is None else ANormError(**a_norm_error),
        }
        return cls(**{**content, **parts})


def relative_gradient(objective: Objective) -> float:
    """Return ‖∇L(θ̂)‖ over the norm of the prior's gradient, or of the data's gradient if the former is 0."""
    with objective.network.pass_counter.phase("relative gradient"):
        total = objective.gradient(objective.theta)
    return relative_to_prior(total, objective)


def relative_to_prior(gradient: Tensor, objective: Objective) -> float:
    """Return `relative_gradient` for a known gradient ∇L(θ̂), (P,)."""
    prior = objective.prior.precision * (objective.theta - objective.prior.mean)
    scale = prior.norm() if float(prior.norm()) > 0 else (gradient - prior).norm()
    return float(gradient.norm() / scale.clamp_min(torch.finfo(gradient.dtype).tiny))
