"""What a fit says about itself: is θ̂ stationary, did the draws converge."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from estimators.errors import NotConvergedWarning
from estimators.objective import Objective
from estimators.regvar.penalty import Penalty
from estimators.regvar.solvers.base import Solution, SolverReport

__all__ = ["EnergyError", "FitReport", "energy_error", "relative_gradient"]

_FAR = 0.5  # digits MLP: .26 to .36 with a mean variance within 2 %, .53 with 6 %, 1 and more far off


@dataclass(frozen=True)
class EnergyError:
    """Mean over draws of ‖u − A⁻¹ξ‖²_A, by one product with A each; u the displacement, n = P less the exact block.

        ‖u − A⁻¹ξ‖²_A = ξᵀA⁻¹ξ − 2ξᵀu + uᵀAu          E ξᵀA⁻¹ξ = n = E‖z‖²

    The first term is unknown, its mean is not; ‖z‖² of the draw's own prior noise is nearer to it, since ξ = √δ z
    wherever the data say nothing. per_parameter divides by n, per_dimension by the effective dimension mean uᵀGu, G the
    data's part of A. The draws leave it uncertain: a small one may come out negative. Var(ξᵀA⁻¹ξ − ‖z‖²) is four
    times the effective dimension d, so that the standard error of per_dimension is `noise` = 2/√(dK).
    """

    per_parameter: float
    per_dimension: float
    noise: float = 0.0

    def warn_if_large(self) -> None:
        """NotConvergedWarning above half of a dimension's variance, by more than chance."""
        if self.per_dimension - 2 * self.noise > _FAR:
            warnings.warn(
                f"the draws have not converged: an energy error of {self.per_dimension:.2g} per effective dimension, "
                f"where {_FAR} is still fair. Try more epochs in FineTune's recipe, a smaller lr if it diverged, or "
                "solver=LinearResponse().",
                NotConvergedWarning,
                stacklevel=5,
            )


@dataclass(frozen=True)
class FitReport:
    """What `fit` found and did.

    relative_gradient: ‖∇L(θ̂)‖ / ‖δ(θ̂ − θ₀)‖, 0 at a stationary point, about 1 far from it; centred refits do not mind.
    solver: of the last solve. energy: of posterior draws. exact_block: which, and why.
    passes: what `fit` spent a replica (a draw), by what it was for, in passes of forward and backward over the training
        rows; every row counted, from the first check of the data on (`estimators.ledger` has the prices).
    """

    relative_gradient: float
    solver: SolverReport | None = None
    energy: EnergyError | None = None
    exact_block: str | None = None
    passes: dict[str, float] = field(default_factory=dict)

    @property
    def total_passes(self) -> float:
        """All of `passes`."""
        return sum(self.passes.values())

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
    with objective.network.ledger.part("relative gradient"):
        total = objective.gradient(objective.theta)
    prior = objective.prior.precision * (objective.theta - objective.prior.mean)
    scale = prior.norm() if float(prior.norm()) > 0 else (total - prior).norm()
    return float(total.norm() / scale.clamp_min(torch.finfo(total.dtype).tiny))


def energy_error(objective: Objective, penalty: Penalty, solution: Solution) -> EnergyError:
    """Of draws ξ = direction, started at z/√δ, ended at u = displacement, all (K, P)."""
    assert penalty.start is not None
    displacement = solution.displacement
    with objective.network.ledger.part("energy error"):
        image = objective.product(displacement) if solution.image is None else solution.image  # u → A u
    drawn = (penalty.direction != 0).any(0)
    n, delta = float(drawn.sum()), objective.prior.precision
    from_prior = torch.where(delta > 0, delta * penalty.start.square(), 1.0)[:, drawn].sum(1)  # ‖z‖²
    quadratic = (displacement * image).sum(1)  # uᵀAu
    linear = (displacement * penalty.direction).sum(1)  # ξᵀu
    along_data = (quadratic - (delta * displacement.square()).sum(1)).mean()  # uᵀGu
    error = float((from_prior - 2 * linear + quadratic).mean())
    dimension = max(float(along_data), torch.finfo(image.dtype).tiny)
    return EnergyError(error / n, error / dimension, 2 / math.sqrt(dimension * len(displacement)))
