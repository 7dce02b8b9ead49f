"""The squared gradient norm of each output: the Laplace variance with A = I."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from estimators.curvature.base import standard_normal
from estimators.curvature.layerwise.blocks import BlockPrecision, Blocks
from estimators.curvature.layerwise.kronecker_block import KroneckerBlock
from estimators.laplace.posterior import LinearizedPosterior
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.models.layer_layout import Layout
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned

__all__ = ["GradientNorm"]


class GradientNorm(LinearizedPosterior):
    """The squared gradient norm of each output, diag(J Jᵀ): linearized Laplace with A = I.

        covariance(x) = J(x) J(x)ᵀ, (C, C)        sample = f + J z, z ~ N(0, I)

    Neither the data nor the prior precision are used, so that only the order of the variances is meaningful until they
    are scaled (`prediction.calibrated(variance_scale=)`). Divided by δ it is the prior variance of the linearized
    network. It is computed from factors layer by layer, without Jacobians of linear layers.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.

    Attributes:
        fit_report_: the passes of the fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> norms = GradientNorm(nn.Linear(3, 2), "regression").fit([(torch.randn(8, 3), torch.randn(8, 2))])
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> norms.variance(x)  # ‖x‖² for the weights and 1 for the bias
        tensor([[15., 15.]])
    """

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        pass

    def _get_fit_state(self) -> Learned:
        return {}, {}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        pass

    def _precision_at(self, x: PyTree) -> BlockPrecision:
        """Return A = I over the layers that these inputs use."""
        network = self.network_
        layers, zero = LayerwiseJacobian(network, x), to_algebra_dtype(network.theta.new_zeros(()))
        rest = zero.expand(network.subset.n_entries(layers.other_params))
        blocks = dict.fromkeys(layers.maps, KroneckerBlock(zero))
        no_curvature = Blocks(network, layers.maps, layers.other_params, blocks, rest)
        return no_curvature.precision(to_algebra_dtype(torch.ones_like(network.theta)))

    def _weight_precision(self) -> BlockPrecision:
        """Return A = I over all weights."""
        subset = self.network_.subset
        ones = to_algebra_dtype(torch.ones_like(self.theta_))
        return BlockPrecision(Layout(subset, {}, list(subset.shapes)), {}, ones)

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        return standard_normal((n_samples, len(self.theta_)), self.theta_, generator)
