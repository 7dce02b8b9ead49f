"""The trained network without epistemic variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from estimators.estimator.base import UncertaintyEstimator
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned

__all__ = ["MAP"]


class MAP(UncertaintyEstimator):
    """The maximum a posteriori network, whose epistemic variance is zero.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights; or a mapping from name patterns to δ.
        prior_mean: θ₀, the mean of the prior, for all weights.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> trained = MAP(nn.Linear(3, 2), "regression").fit([(torch.randn(8, 3), torch.randn(8, 2))])
        >>> float(trained.variance(torch.randn(4, 3)).max())
        0.0
    """

    export_route = "batch"

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        pass

    def _get_fit_state(self) -> Learned:
        return {}, {}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        pass

    def _variance(self, x: PyTree) -> Tensor:
        return torch.zeros_like(self.network_.outputs(x))

    def _covariance(self, x: PyTree) -> Tensor:
        return torch.diag_embed(self._variance(x))

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        f = self.network_.outputs(x)
        return f.expand(n_samples, *f.shape)
