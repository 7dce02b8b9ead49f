"""The A-norm error of posterior draws: an estimate of their distance to the exact solution."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from estimators.curvature.krylov.block_cg import BlockSolution
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.errors import NotConvergedWarning
from estimators.numerics.reductions import dots, inner
from estimators.regvar.perturbation import Perturbation

__all__ = ["CONVERGED", "ANormError", "SampleANormErrors"]

CONVERGED = 0.5
"""A-norm error per effective dimension below which draws count as converged.

Digits MLP: .26 to .36 gives a mean variance within 2 %, .53 within 6 %; from 1 on it is far off.
"""


@dataclass(frozen=True)
class ANormError:
    """Mean over draws of ‖u − A⁻¹ξ‖²_A, the squared error of displacements u in the norm of A.

        ‖u − A⁻¹ξ‖²_A = ξᵀA⁻¹ξ − 2ξᵀu + uᵀAu          E ξᵀA⁻¹ξ = n = E‖z‖²

    The last two terms cost one product with A per draw. The first is unknown, but its mean is n, the number of drawn
    parameters: P without the last layer of Rao-Blackwellisation. It is estimated by ‖z‖² of the draw's own prior
    noise, which has the same mean and is closer, since ξ = √δ z in directions without data.

    Args:
        per_parameter: the estimate divided by n.
        per_dimension: the estimate divided by the effective dimension d, the mean of uᵀGu, G the data's part of A.
            The estimate is noisy: a small one can be negative.
        standard_error: of `per_dimension`, 2/√(dK) for K draws, since Var(ξᵀA⁻¹ξ − ‖z‖²) = 4d.
        bound: upper bound of the error per dimension. It holds for certain, since A ⪰ δ: with r = ξ − A u,
            ‖u − A⁻¹ξ‖²_A = rᵀA⁻¹r ≤ Σ r²/δ.
    """

    per_parameter: float
    per_dimension: float
    standard_error: float = 0.0
    bound: float = math.inf

    @property
    def clipped(self) -> float:
        """`per_dimension`, clipped to [0, `bound`], in which the error lies for certain."""
        return min(max(self.per_dimension, 0.0), self.bound)

    def warn_if_large(self) -> None:
        """Emit NotConvergedWarning if the error exceeds 0.5 per dimension by more than two standard errors."""
        if min(self.per_dimension - 2 * self.standard_error, self.bound) > CONVERGED:
            warnings.warn(
                f"the draws have not converged: expected an A-norm error of at most {CONVERGED} per effective "
                f"dimension, received {self.per_dimension:.2g}. Try more epochs in the recipe of FineTune, a smaller "
                "lr if it diverged, or solver=LinearResponse(), with tol=1e-2 if that is the solver already.",
                NotConvergedWarning,
                stacklevel=5,
            )


@dataclass(frozen=True)
class SampleANormErrors:
    """The terms of the A-norm error of each draw.

    Args:
        terms: ‖z‖², ξᵀu, uᵀAu, Σδu² and the bound Σr²/δ of each draw, (K, 5).
        n: number of drawn parameters.
    """

    terms: Tensor
    n: float

    @classmethod
    def of(
        cls,
        perturbation: Perturbation,
        delta: Tensor,
        displacement: Tensor,
        slope: Tensor,
    ) -> Self:
        """Return the terms at given displacements.

        Args:
            perturbation: the draws ξ as gradients, and z/√δ as initial guesses, (K, P) each.
            delta: prior precision δ, (P,).
            displacement: u, (K, P).
            slope: A u − ξ, (K, P).

        Returns:
            The terms of each draw.
        """
        n, from_prior = _prior_draw_norms(perturbation, delta)
        linear = dots(displacement, perturbation.gradient)  # ξᵀu
        quadratic, prior_part = linear + dots(displacement, slope), dots(displacement, displacement, delta)
        positive = bool((delta > 0).all())
        bound = dots(slope, slope, 1 / delta) if positive else torch.full_like(linear, math.inf)
        return cls(torch.stack([from_prior, linear, quadratic, prior_part, bound], 1), n)

    @classmethod
    def from_block_cg(
        cls, perturbation: Perturbation, delta: Tensor, coordinates: PriorWhitening, solved: BlockSolution
    ) -> Self:
        """Return the terms after a solve in whitened `coordinates`; the residual b − A u = leftᵀ Q needs no product."""
        n, from_prior = _prior_draw_norms(perturbation, delta)
        u, unit = solved.solution, coordinates.unit  # of the prior
        linear = dots(u, coordinates.whiten_rhs(perturbation.gradient))
        quadratic = linear - (inner(u, solved.next_block) * solved.residual_coefficients.T).sum(1)
        prior_part = dots(u, u, delta) if coordinates.scale is None else unit * dots(u, u)
        left = solved.residual_coefficients.square().sum(0)
        bound = left / unit if unit > 0 else torch.full_like(left, math.inf)
        return cls(torch.stack([from_prior, linear, quadratic, prior_part, bound], 1), n)

    @property
    def dimensions(self) -> Tensor:
        """uᵀGu of each draw, (K,); its mean is the effective dimension.

        It is the difference uᵀAu − Σδu², and at least the round-off of both, where the data constrain nothing.
        """
        quadratic, prior_part = self.terms[:, 2], self.terms[:, 3]
        round_off = torch.finfo(self.terms.dtype).eps * quadratic.clamp_min(sys.float_info.min)
        return torch.maximum(quadratic - prior_part, round_off)

    @property
    def error(self) -> ANormError:
        """The A-norm error, averaged over all draws."""
        from_prior, linear, quadratic, _, bound = self.terms.mean(0).tolist()
        error, dimension = from_prior - 2 * linear + quadratic, float(self.dimensions.mean())
        standard_error = 2 / math.sqrt(dimension * len(self.terms))
        return ANormError(error / self.n, error / dimension, standard_error, bound / dimension)


def _prior_draw_norms(perturbation: Perturbation, delta: Tensor) -> tuple[float, Tensor]:
    """Return n, the number of drawn parameters, and ‖z‖² of each draw over these, (K,)."""
    assert perturbation.initial_guess is not None
    drawn = torch.zeros_like(delta, dtype=torch.bool)
    for gradient in perturbation.gradient:
        drawn |= gradient != 0
    without_prior = float((drawn & (delta == 0)).sum())  # z is not stored there: use its expected norm
    return float(drawn.sum()), dots(
        perturbation.initial_guess, perturbation.initial_guess, delta * drawn
    ) + without_prior
