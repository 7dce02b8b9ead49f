"""What a fit says about itself: is θ̂ stationary, did the draws converge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.objective import Objective
from estimators.regvar.penalty import Penalty
from estimators.regvar.solvers.base import SolverReport

__all__ = ["EnergyError", "FitReport", "energy_error", "relative_gradient"]


@dataclass(frozen=True)
class EnergyError:
    """Mean over draws of ‖u − A⁻¹ξ‖²_A, estimated by n − 2ξᵀu + uᵀAu with one product with A a draw.

    per_parameter divides by n = P less the exact block, per_dimension by the effective dimension mean uᵀGu, G the data's
    part of A. The draws themselves make it uncertain by about √(2n/K)/n: a small one may come out negative.
    """

    per_parameter: float
    per_dimension: float


@dataclass(frozen=True)
class FitReport:
    """relative_gradient: ‖∇L(θ̂)‖ / ‖δ(θ̂ − θ₀)‖, 0 at a stationary point, about 1 far from it; centred refits do not mind.

    solver: of the last solve. energy: of posterior draws. exact_block: which, and why.
    """

    relative_gradient: float
    solver: SolverReport | None = None
    energy: EnergyError | None = None
    exact_block: str | None = None


def relative_gradient(objective: Objective) -> float:
    """‖∇L(θ̂)‖ over the slope of the prior there; over that of the data where the prior has none."""
    total = objective.gradient(objective.theta)
    prior = objective.prior.precision * (objective.theta - objective.prior.mean)
    scale = prior.norm() if float(prior.norm()) > 0 else (total - prior).norm()
    return float(total.norm() / scale.clamp_min(torch.finfo(total.dtype).tiny))


def energy_error(objective: Objective, penalty: Penalty, displacement: Tensor) -> EnergyError:
    """(n − 2ξᵀu + uᵀAu)/n, averaged over draws ξ = direction, u = displacement (K, P) (SCIENCE, section 2)."""
    image = objective.product(displacement)  # u → A u
    drawn = float((penalty.direction != 0).any(0).sum())  # n
    quadratic = (displacement * image).sum(1)  # uᵀAu
    linear = (displacement * penalty.direction).sum(1)  # ξᵀu
    dimension = quadratic - (objective.prior.precision * displacement.square()).sum(1)  # uᵀGu
    error = float((drawn - 2 * linear + quadratic).mean())
    return EnergyError(error / drawn, error / max(float(dimension.mean()), torch.finfo(image.dtype).tiny))
