"""The exact variance J A⁻¹ Jᵀ beside posterior draws, from a Cholesky factor of A."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.curvature.dense.cholesky import DensePrecision
from estimators.models.functionals import Functional
from estimators.numerics.pytrees import PyTree
from estimators.persistence.state import Learned
from estimators.regvar.bounds import Bounds
from estimators.regvar.monte_carlo import MonteCarloVariance

__all__ = ["ExactDraws"]


class ExactDraws(MonteCarloVariance):
    """The exact variance, and function samples of the draws.

    Args:
        draws: the posterior draws.
        precision: A with its Cholesky factor.
        round_off: relative error that round-off may cause, from the condition number of A.
    """

    def __init__(self, draws: MonteCarloVariance, precision: DensePrecision, round_off: float) -> None:
        super().__init__(draws.network, draws.displacement, draws.block, draws.rao_blackwell)
        self.precision, self.round_off = precision, round_off

    def state(self) -> Learned:
        tensors, learned = super().state()
        about = {"allows_float32": self.precision.allows_float32, "round_off": self.round_off}
        return {**tensors, "cholesky": self.precision.cholesky}, {**learned, **about}

    def compose(self, of: Functional) -> ExactDraws:
        return ExactDraws(super().compose(of), self.precision, self.round_off)

    def variance(self, x: PyTree) -> Tensor:
        return self.precision.variance_at(self.network, x)

    def variance_bounds(self, x: PyTree) -> Bounds:
        """Return lower and upper bound of the variance, (M, C) each: the variance itself."""
        variance = self.variance(x)
        return variance, variance

    def covariance(self, x: PyTree) -> Tensor:
        return self.precision.covariance_at(self.network, x)

    def covariance_along(self, jacobian: Tensor) -> Tensor:
        return self.precision.differentiable_covariance(jacobian).to(jacobian.dtype)

    def joint_covariance(self, x: PyTree) -> Tensor:
        jacobian = self.network.jacobian(x)
        white = self.precision.whiten(jacobian)  # (M, P, C)
        return torch.einsum("mpc,npd->mcnd", white, white).to(jacobian.dtype)

    def standard_error(self, x: PyTree) -> Tensor:
        """Return `round_off` times the variance, (M, C): nothing else is uncertain."""
        return self.round_off * self.variance(x)
