"""How far draws are from their end, in the energy norm."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from estimators.curvature.krylov.block_cg import BlockSolution
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.data.distributed import ProcessGroup
from estimators.errors import NotConvergedWarning
from estimators.numerics.reductions import dots, inner
from estimators.regvar.perturbation import Perturbation

__all__ = ["FAIR", "ANormError", "SampleANormErrors", "prior_energy"]

FAIR = 0.5  # digits MLP: .26 to .36 with a mean variance within 2 %, .53 with 6 %, 1 and more far off


@dataclass(frozen=True)
class ANormError:
    """Mean over draws of ‖u − A⁻¹ξ‖²_A, by one product with A each; u the displacement, n = P less the exact block.

        ‖u − A⁻¹ξ‖²_A = ξᵀA⁻¹ξ − 2ξᵀu + uᵀAu          E ξᵀA⁻¹ξ = n = E‖z‖²

    The first term is unknown, its mean is not; ‖z‖² of the draw's own prior noise is nearer to it, since ξ = √δ z
    wherever the data say nothing. per_parameter divides by n, per_dimension by the effective dimension mean uᵀGu, G the
    data's part of A. The draws leave it uncertain: a small one may come out negative (`clipped` does not).
    Var(ξᵀA⁻¹ξ − ‖z‖²) is four times the effective dimension d, so that the standard error of
    per_dimension is `noise` = 2/√(dK).
    `bound` is certain, since A is at least the prior: ‖u − A⁻¹ξ‖²_A = rᵀA⁻¹r ≤ Σ r²/δ for r = ξ − A u, per dimension.
    """

    per_parameter: float
    per_dimension: float
    noise: float = 0.0
    bound: float = math.inf

    @property
    def clipped(self) -> float:
        """per_dimension, brought between 0 and `bound`, within which the error lies for certain."""
        return min(max(self.per_dimension, 0.0), self.bound)

    def warn_if_large(self) -> None:
        """NotConvergedWarning above half of a dimension's variance, by more than chance."""
        if min(self.per_dimension - 2 * self.noise, self.bound) > FAIR:
            warnings.warn(
                f"the draws have not converged: an energy error of {self.per_dimension:.2g} per effective dimension, "
                f"where {FAIR} is still fair. Try more epochs in FineTune's recipe, a smaller lr if it diverged, or "
                "solver=LinearResponse(), with tol=1e-2 where it is that already.",
                NotConvergedWarning,
                stacklevel=5,
            )


@dataclass(frozen=True)
class SampleANormErrors:
    """What the energy error is made of, for each draw: terms (K, 5); and n, over how many parameters they are drawn."""

    terms: Tensor
    n: float

    @classmethod
    def of(
        cls,
        perturbation: Perturbation,
        delta: Tensor,
        displacement: Tensor,
        slope: Tensor,
        prior: tuple[float, Tensor] | None = None,
    ) -> Self:
        """Of draws ξ = direction, started at z/√δ, at u = displacement, with the slope A u − ξ, all (K, P); δ (P,).

        prior: their `prior_energy`, where it is known.
        """
        n, from_prior = prior_energy(perturbation, delta) if prior is None else prior
        linear = dots(displacement, perturbation.direction)  # ξᵀu
        quadratic, held = linear + dots(displacement, slope), dots(displacement, displacement, delta)
        positive = bool((delta > 0).all())
        bound = dots(slope, slope, 1 / delta) if positive else torch.full_like(linear, math.inf)
        return cls(torch.stack([from_prior, linear, quadratic, held, bound], 1), n)

    @classmethod
    def solved(
        cls, perturbation: Perturbation, delta: Tensor, coordinates: PriorWhitening, solved: BlockSolution
    ) -> Self:
        """The same after a solve in other `coordinates`, from u alone: b − A u = leftᵀ Q, along the next block Q."""
        n, from_prior = prior_energy(perturbation, delta)
        u, unit = solved.solution, coordinates.unit  # of the prior
        linear = dots(u, coordinates.right(perturbation.direction))
        quadratic = linear - (inner(u, solved.next_block) * solved.left.T).sum(1)
        held = dots(u, u, delta) if coordinates.scale is None else unit * dots(u, u)
        left = solved.left.square().sum(0)
        bound = left / unit if unit > 0 else torch.full_like(left, math.inf)
        return cls(torch.stack([from_prior, linear, quadratic, held, bound], 1), n)

    @classmethod
    def joined(cls, parts: Sequence[SampleANormErrors]) -> Self:
        """Those of draws that were solved a part after the other."""
        return cls(torch.cat([part.terms for part in parts]), parts[0].n)

    def together(self, process_group: ProcessGroup, n_draws: int) -> Self:
        """Those of all draws, where several processes have shared them out."""
        return replace(self, terms=process_group.together(self.terms, n_draws))

    @property
    def dimensions(self) -> Tensor:
        """uᵀGu of each draw, (K,): the effective dimension, on average."""
        dimensions: Tensor = (self.terms[:, 2] - self.terms[:, 3]).clamp_min(sys.float_info.min)
        return dimensions

    @property
    def error(self) -> ANormError:
        """Of all draws."""
        from_prior, linear, quadratic, _, bound = self.terms.mean(0).tolist()
        error, dimension = from_prior - 2 * linear + quadratic, float(self.dimensions.mean())
        noise = 2 / math.sqrt(dimension * len(self.terms))
        return ANormError(error / self.n, error / dimension, noise, bound / dimension)


def prior_energy(perturbation: Perturbation, delta: Tensor) -> tuple[float, Tensor]:
    """n, and ‖z‖² of each draw, (K,), over what is drawn."""
    assert perturbation.start is not None
    drawn = torch.zeros_like(delta, dtype=torch.bool)
    for direction in perturbation.direction:
        drawn |= direction != 0
    unknown = float((drawn & (delta == 0)).sum())  # without a prior, z itself is not kept
    return float(drawn.sum()), dots(perturbation.start, perturbation.start, delta * drawn) + unknown
