"""Laplace over individually chosen weights; the others are fixed."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.curvature.builders import BUILDERS
from estimators.curvature.dense.cholesky import DensePrecision, bytes_needed
from estimators.curvature.dense.ggn import ggn_rows
from estimators.curvature.dense.subset import ColumnPrecision
from estimators.curvature.forms import DenseCurvature
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.laplace.posterior import LinearizedPosterior
from estimators.likelihoods import Likelihood
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.symmetric import add_gram, mirror
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_integer
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory

__all__ = ["SubnetworkLaplace"]

_CHOICES = ("variance", "magnitude")


class SubnetworkLaplace(LinearizedPosterior):
    """Linearized Laplace with the full GGN of a set S of single weights (Daxberger et al. 2021, subnetwork inference).

        A_S = Σₙ (Jₙᵀ Λₙ Jₙ)_SS + δ_S          covariance(x) = J_S A_S⁻¹ J_Sᵀ, (C, C)

    The variance is at most that of LinearizedLaplace over `subset_of_weights`.
    Weights that no training row uses, such as those of pixels that are always 0, have the largest marginal variance,
    1/δ, and change no output. If there are many of them, choose by magnitude.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights; or a mapping from name patterns to δ.
        prior_mean: θ₀, the mean of the prior, for all weights.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        n_parameters: the largest number of weights in S. If the subset has fewer, all of them are used, which equals
            LinearizedLaplace.
        chosen_by: "variance" for the largest marginal variances 1/(diag GGN + δ) of a diagonal Laplace, as in the
            paper, or "magnitude" for the largest |θ̂|.

    Attributes:
        index_: the indices of S in θ, ascending.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option. `fit` raises TooLargeError before any allocation, and
            IndefiniteHessianError if A_S is singular, which needs a δ of 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> laplace = SubnetworkLaplace(model, "regression", n_parameters=10)
        >>> laplace = laplace.fit([(torch.randn(20, 3), torch.randn(20, 2))])
        >>> laplace.index_.shape
        torch.Size([10])
    """

    uses_prior_precision = True
    precision_: ColumnPrecision

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        n_parameters: int = 1000,
        chosen_by: str = "variance",
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.n_parameters = checked_integer("n_parameters", n_parameters, at_least=1)
        self.chosen_by = checked_choice("chosen_by", chosen_by, _CHOICES)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        n = min(self.n_parameters, objective.network.n_parameters)
        device = objective.theta.device
        needed = bytes_needed(n, algebra_dtype(device).itemsize)
        check_fits_memory(f"the precision of {n} weights", needed, device=device, remedy="fewer n_parameters.")
        scores = objective.theta.abs() if self.chosen_by == "magnitude" else _marginal_variance(objective)
        index = scores.sort(descending=True, stable=True).indices[:n].sort().values
        with objective.network.pass_counter.phase("curvature"):
            matrix = DenseCurvature(_ggn_of(objective, index), exact_hessian=False)
        self._set_curvature(matrix, index, objective)

    def _set_curvature(self, matrix: DenseCurvature, index: Tensor, objective: Objective) -> None:
        self.data_curvature_, self.index_ = matrix, index
        self.precision_ = ColumnPrecision(matrix.precision(objective.prior.precision[index]), index)

    def _get_fit_state(self) -> Learned:
        return {**self.data_curvature_.tensors(), "index": self.index_}, {}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self._set_curvature(DenseCurvature(tensors["matrix"], exact_hessian=False), tensors["index"], objective)

    def _displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        inner, theta = self.precision_.inner, self.theta_
        assert isinstance(inner, DensePrecision)
        return self.precision_.scattered(inner.sample(n_samples, generator).to(theta.dtype), len(theta))


def _marginal_variance(objective: Objective) -> Tensor:
    """Return 1/(diag GGN + δ), (P,)."""
    with objective.network.pass_counter.phase("choice"):
        diagonal, _ = BUILDERS["ggn", "diag", "eigen"](objective.centred(curvature="ggn"))
    precision = diagonal.precision(objective.prior.precision)
    return precision.solve(torch.ones_like(objective.theta)[None])[0]


def _ggn_of(objective: Objective, index: Tensor) -> Tensor:
    """Return (Σₙ Jₙᵀ Λₙ Jₙ)_SS, (n, n), without the prior."""
    total = objective.theta.new_zeros(len(index), len(index), dtype=algebra_dtype(objective.theta.device))
    for rows in ggn_rows(objective):
        add_gram(total, rows[:, index].to(total.dtype).T)
    mirror(total)
    return total
