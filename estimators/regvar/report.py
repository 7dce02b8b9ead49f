"""What a fit says about itself: is θ̂ stationary, did the draws converge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from estimators.objective import Objective
from estimators.regvar.penalty import Penalty
from estimators.regvar.solvers.base import Solution, SolverReport

__all__ = ["EnergyError", "FitReport", "energy_error", "relative_gradient"]


@dataclass(frozen=True)
class EnergyError:
    """Mean over draws of ‖u − A⁻¹ξ‖²_A, by one product with A each; u the displacement, n = P less the exact block.

        ‖u − A⁻¹ξ‖²_A = ξᵀA⁻¹ξ − 2ξᵀu + uᵀAu          E ξᵀA⁻¹ξ = n = E‖z‖²

    The first term is unknown, its mean is not; ‖z‖² of the draw's own prior noise is nearer to it, since ξ = √δ z
    wherever the data say nothing. per_parameter divides by n, per_dimension by the effective dimension mean uᵀGu, G the
    data's part of A. The draws leave it uncertain: a small one may come out negative.
    """

    per_parameter: float
    per_dimension: float


@dataclass(frozen=True)
class FitReport:
    """What `fit` found and did.

    relative_gradient: ‖∇L(θ̂)‖ / ‖δ(θ̂ − θ₀)‖, 0 at a stationary point, about 1 far from it; centred refits do not mind.
    solver: of the last solve. energy: of posterior draws. exact_block: which, and why.
    """

    relative_gradient: float
    solver: SolverReport | None = None
    energy: EnergyError | None = None
    exact_block: str | None = None

    @classmethod
    def restored(cls, content: dict[str, Any]) -> FitReport:
        """From the dict of its fields."""
        solver, energy = content["solver"], content["energy"]
        parts = {
            "solver": None if solver is None else SolverReport(**solver),
            "energy": None if energy is None else EnergyError(**energy),
        }
        return cls(**{**content, **parts})


def relative_gradient(objective: Objective) -> float:
    """‖∇L(θ̂)‖ over the slope of the prior there; over that of the data where the prior has none."""
    total = objective.gradient(objective.theta)
    prior = objective.prior.precision * (objective.theta - objective.prior.mean)
    scale = prior.norm() if float(prior.norm()) > 0 else (total - prior).norm()
    return float(total.norm() / scale.clamp_min(torch.finfo(total.dtype).tiny))


def energy_error(objective: Objective, penalty: Penalty, solution: Solution) -> EnergyError:
    """Of draws ξ = direction, started at z/√δ, ended at u = displacement, all (K, P)."""
    assert penalty.start is not None
    displacement = solution.displacement
    image = objective.product(displacement) if solution.image is None else solution.image  # u → A u
    drawn = (penalty.direction != 0).any(0)
    n, delta = float(drawn.sum()), objective.prior.precision
    from_prior = torch.where(delta > 0, delta * penalty.start.square(), 1.0)[:, drawn].sum(1)  # ‖z‖²
    quadratic = (displacement * image).sum(1)  # uᵀAu
    linear = (displacement * penalty.direction).sum(1)  # ξᵀu
    dimension = quadratic - (delta * displacement.square()).sum(1)  # uᵀGu
    error = float((from_prior - 2 * linear + quadratic).mean())
    return EnergyError(error / n, error / max(float(dimension.mean()), torch.finfo(image.dtype).tiny))
