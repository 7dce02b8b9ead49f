"""What a fit says about itself: is θ̂ stationary, did the draws converge, what was spent."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """What `fit` found and did.

    relative_gradient: ‖∇L(θ̂)‖ / ‖δ(θ̂ − θ₀)‖, 0 at a stationary point, about 1 far from it; centred refits do not mind.
    solver: of the last solve. energy: of posterior draws. exact_block: which, and why.
    passes: what `fit` spent a replica (a draw), by what it was for, in passes of forward and backward over the training
        rows; every row counted, from the first check of the data on (`estimators.runtime.pass_counter` has the prices).
    """

    relative_gradient: float
    solver: SolverReport | None = None
    energy: ANormError | None = None
    rao_blackwell: str | None = None
    passes: dict[str, float] = field(default_factory=dict)

    @property
    def total_passes(self) -> float:
        """All of `passes`."""
        return sum(self.passes.values())

    @classmethod
    def restored(cls, content: dict[str, Any]) -> RegVarReport:
        """From the dict of its fields."""
        solver, energy, derivatives = content["solver"], content["energy"], content.get("derivatives")
        parts = {
            "derivatives": None if derivatives is None else DerivativeReport(**derivatives),
            "solver": None if solver is None else SolverReport(**solver),
            "energy": None if energy is None else ANormError(**energy),
        }
        return cls(**{**content, **parts})


def relative_gradient(objective: Objective) -> float:
    """‖∇L(θ̂)‖ over the slope of the prior there; over that of the data where the prior has none."""
    with objective.network.pass_counter.phase("relative gradient"):
        total = objective.gradient(objective.theta)
    return relative_to_prior(total, objective)


def relative_to_prior(gradient: Tensor, objective: Objective) -> float:
    """The same for ∇L(θ̂) (P,) that is known."""
    prior = objective.prior.precision * (objective.theta - objective.prior.mean)
    scale = prior.norm() if float(prior.norm()) > 0 else (gradient - prior).norm()
    return float(gradient.norm() / scale.clamp_min(torch.finfo(gradient.dtype).tiny))
