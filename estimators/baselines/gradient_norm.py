"""The squared norm of the gradient of each output: what is left of a Laplace variance without curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from estimators.curvature.layerwise.blocks import BlockPrecision, Blocks
from estimators.curvature.layerwise.kronecker_block import KroneckerBlock
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.fit_report import PassReport
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned

__all__ = ["GradientNorm"]


class GradientNorm(UncertaintyEstimator):
    """variance(x) = diag(J Jᵀ), the squared gradient norm of each output: RegVar with A = I, in closed form.

        covariance(x) = J(x) J(x)ᵀ, (C, C)        sample = f + J z, z ~ N(0, I)

    Nothing is learned, and neither data nor prior precision enter: only the order of the variances means something,
    until they are scaled (`prediction.calibrated(variance_scale=)`). Over δ it is the variance before any data.
    It is read from factors layer by layer, so that no Jacobian of a linear layer is made.

    Fitted: `fit_report_`.
    """

    fit_report_: PassReport

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        self.fit_report_ = PassReport.of(objective)

    def _get_fit_state(self) -> Learned:
        return {}, {"passes": self.fit_report_.passes}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self.fit_report_ = PassReport(passes=learned["passes"])

    def _variance(self, x: PyTree) -> Tensor:
        return _identity(self.network_, x).variance_at(self.network_, x)

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        return _identity(self.network_, x).variance_at(ComposedNetwork(self.network_, of), x)

    def _covariance(self, x: PyTree) -> Tensor:
        return _identity(self.network_, x).covariance_at(self.network_, x)

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        theta = self.theta_
        z = torch.randn(n_samples, len(theta), generator=generator, dtype=theta.dtype, device=theta.device)
        return self.network_.outputs(x) + self.network_.jvp(x, z)


def _identity(network: Network, x: PyTree) -> BlockPrecision:
    """A = I over the layers that these inputs go through."""
    layers, zero = LayerwiseJacobian(network, x), network.theta.new_zeros(())
    rest = zero.expand(network.subset.n_entries(layers.rest))
    blocks = dict.fromkeys(layers.maps, KroneckerBlock(zero))
    nothing = Blocks(network, layers.maps, layers.rest, blocks, rest)
    return nothing.precision(torch.ones_like(network.theta))
