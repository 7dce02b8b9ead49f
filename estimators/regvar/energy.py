"""How far draws are from their end, in the energy norm."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.errors import NotConvergedWarning
from estimators.long_rows import dots
from estimators.regvar.penalty import Penalty

__all__ = ["FAIR", "EnergyError", "energy_error", "prior_energy", "whitened_error"]

FAIR = 0.5  # digits MLP: .26 to .36 with a mean variance within 2 %, .53 with 6 %, 1 and more far off


@dataclass(frozen=True)
class EnergyError:
    """Mean over draws of ‖u − A⁻¹ξ‖²_A, by one product with A each; u the displacement, n = P less the exact block.

        ‖u − A⁻¹ξ‖²_A = ξᵀA⁻¹ξ − 2ξᵀu + uᵀAu          E ξᵀA⁻¹ξ = n = E‖z‖²

    The first term is unknown, its mean is not; ‖z‖² of the draw's own prior noise is nearer to it, since ξ = √δ z
    wherever the data say nothing. per_parameter divides by n, per_dimension by the effective dimension mean uᵀGu, G the
    data's part of A. The draws leave it uncertain: a small one may come out negative. Var(ξᵀA⁻¹ξ − ‖z‖²) is four
    times the effective dimension d, so that the standard error of per_dimension is `noise` = 2/√(dK).
    `bound` is certain, since A is at least the prior: ‖u − A⁻¹ξ‖²_A = rᵀA⁻¹r ≤ Σ r²/δ for r = ξ − A u, per dimension.
    """

    per_parameter: float
    per_dimension: float
    noise: float = 0.0
    bound: float = math.inf

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


def energy_error(penalty: Penalty, delta: Tensor, displacement: Tensor, image: Tensor) -> EnergyError:
    """Of draws ξ = direction, started at z/√δ, at u = displacement, with their image A u, all (K, P); δ (P,)."""
    n, from_prior = prior_energy(penalty, delta)
    linear, quadratic = dots(displacement, penalty.direction), dots(displacement, image)  # ξᵀu, uᵀAu
    held = dots(displacement, displacement, delta)
    error, dimension = _error_and_dimension(from_prior, linear, quadratic, held, image.dtype)
    noise, bound = 2 / math.sqrt(dimension * len(displacement)), _bound(penalty.direction, image, delta)
    return EnergyError(error / n, error / dimension, noise, bound / dimension)


def _error_and_dimension(
    from_prior: Tensor, linear: Tensor, quadratic: Tensor, held: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Means over draws of ‖z‖² − 2ξᵀu + uᵀAu, and of uᵀGu = uᵀAu − uᵀδu, from ‖z‖², ξᵀu, uᵀAu and uᵀδu, (K,) each."""
    error, along_data = (from_prior - 2 * linear + quadratic).mean(), (quadratic - held).mean()
    return float(error), max(float(along_data), torch.finfo(dtype).tiny)


def _bound(direction: Tensor, image: Tensor, delta: Tensor) -> float:
    """Mean of Σ (ξ − A u)²/δ, a draw at a time; infinite without a prior on every parameter."""
    if not bool((delta > 0).all()):
        return math.inf
    remainders = ((xi - product)[None] for xi, product in zip(direction, image, strict=True))
    return sum(float(dots(r, r, 1 / delta)) for r in remainders) / len(direction)


def prior_energy(penalty: Penalty, delta: Tensor) -> tuple[float, Tensor]:
    """n, and ‖z‖² of each draw, (K,), over what is drawn."""
    assert penalty.start is not None
    drawn = (penalty.direction != 0).any(0)
    unknown = float((drawn & (delta == 0)).sum())  # without a prior, z itself is not kept
    return float(drawn.sum()), dots(penalty.start, penalty.start, delta * drawn) + unknown


def whitened_error(b: Tensor, prior_draws: Tensor, u: Tensor, remainder: Tensor) -> float:
    """The energy error per dimension, or its bound if that is less, where the prior is the identity.

    A = G + 1, b − A u = remainder, all (K, P).
    """
    linear = dots(u, b)
    quadratic = linear - dots(u, remainder)  # uᵀAu
    from_prior, held = dots(prior_draws, prior_draws), dots(u, u)
    error, dimension = _error_and_dimension(from_prior, linear, quadratic, held, u.dtype)
    return min(error, float(dots(remainder, remainder).mean())) / dimension
