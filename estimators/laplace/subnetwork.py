"""Laplace over individually chosen weights; the others are fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.curvature.builders import BUILDERS, GGNOptions
from estimators.curvature.dense.cholesky import DensePrecision, bytes_needed
from estimators.curvature.dense.ggn import ggn_rows
from estimators.curvature.dense.subset import ColumnPrecision
from estimators.curvature.forms import DenseCurvature
from estimators.errors import OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.laplace.evidence import EvidenceFunction, log_det_of_sum
from estimators.laplace.evidence_mixin import EvidenceMixin
from estimators.laplace.posterior import LinearizedPosterior
from estimators.laplace.updating import UpdateMixin
from estimators.likelihoods import Likelihood
from estimators.models.exclusive import exclusively
from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.symmetric import add_gram, mirror
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_integer, shown
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory

__all__ = ["SubnetworkLaplace"]

_CHOICES = ("variance", "magnitude")
_N_PARAMETERS = 1000
"""The default size of a subnetwork: its precision takes 8 MB."""


class SubnetworkLaplace(UpdateMixin, EvidenceMixin, LinearizedPosterior):
    """Linearized Laplace with the full GGN of a set S of single weights (Daxberger et al. 2021, subnetwork inference).

        A_S = Σₙ (Jₙᵀ Λₙ Jₙ)_SS + δ_S          covariance(x) = J_S A_S⁻¹ J_Sᵀ, (C, C)

    The variance is at most that of LinearizedLaplace over `subset_of_weights`.
    `update` adds rows in one pass over them if S does not depend on the data. With `chosen_by="variance"`, S is chosen
    again from all rows: the new fit passes over the earlier rows, too, and a loaded fit needs `attach_data` before.
    `log_marginal_likelihood(prior_precision)` is over the S of the fit. With `chosen_by="variance"` and several prior
    precisions, S depends on them: `clone_with(prior_precision=...)` may choose other weights, and then has another
    marginal likelihood.
    Weights that no training row uses, such as those of pixels that are always 0, have the largest marginal variance,
    1/δ, and change no output. If there are many of them, choose by magnitude.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        n_parameters: the largest number of weights in S. If the subset has fewer, all of them are used, which equals
            LinearizedLaplace.
        chosen_by: "variance" for the largest marginal variances 1/(diag GGN + δ) of a diagonal Laplace, as in the
            paper, or "magnitude" for the largest |θ̂|.
        subnetwork_indices: S itself, in place of `n_parameters` and `chosen_by`: different indices into θ, the
            parameters of `subset_of_weights` flattened in the order of the model; or a mapping from parameter names to
            masks (bool) of the parameters' shapes, in which parameters without a mask have no weight in S.

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

    export_route = "rows"
    uses_prior_precision = True
    precision_: ColumnPrecision

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        n_parameters: int = _N_PARAMETERS,
        chosen_by: str = "variance",
        subnetwork_indices: Tensor | Sequence[int] | Mapping[str, Tensor] | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.n_parameters = checked_integer("n_parameters", n_parameters, at_least=1)
        self.chosen_by = checked_choice("chosen_by", chosen_by, _CHOICES)
        if subnetwork_indices is not None and (n_parameters, chosen_by) != (_N_PARAMETERS, _CHOICES[0]):
            raise OptionError(
                "either subnetwork_indices, or n_parameters and chosen_by",
                received="both",
                remedy="leave out n_parameters and chosen_by.",
            )
        self.subnetwork_indices = _checked_indices(subnetwork_indices)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        given = self.subnetwork_indices
        index = None if given is None else _given_index(given, objective.network)
        n = min(self.n_parameters, objective.network.n_parameters) if index is None else len(index)
        device = objective.theta.device
        needed = bytes_needed(n, algebra_dtype(device).itemsize)
        check_fits_memory(f"the precision of {n} weights", needed, device=device, remedy="fewer n_parameters.")
        if index is None:
            index = self._chosen_index(objective, n)
        with objective.network.pass_counter.phase("curvature"):
            matrix = DenseCurvature(_ggn_of(objective, index), exact_hessian=False)
        self._set_curvature(matrix, index, objective)

    def _chosen_index(self, objective: Objective, n: int) -> Tensor:
        """Return the indices of the n weights with the largest scores, ascending."""
        scores = objective.theta.abs() if self.chosen_by == "magnitude" else _marginal_variance(objective)
        return scores.sort(descending=True, stable=True).indices[:n].sort().values

    @property
    def _chosen_by_data(self) -> bool:
        """Whether other training rows may lead to other weights S."""
        is_choice = self.subnetwork_indices is None and self.n_parameters < self.network_.n_parameters
        return is_choice and self.chosen_by == "variance"

    def _set_curvature(self, matrix: DenseCurvature, index: Tensor, objective: Objective) -> None:
        precision = ColumnPrecision(matrix.precision(objective.prior.precision[index]), index)  # first: it may raise
        self.data_curvature_, self.index_, self.precision_ = matrix, index, precision

    def _get_fit_state(self) -> Learned:
        return {**self.data_curvature_.tensors(), "index": self.index_}, {}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self._set_curvature(DenseCurvature(tensors["matrix"], exact_hessian=False), tensors["index"], objective)

    def _check_updatable(self) -> None:
        pass  # a dense GGN of weights S is a sum

    def _add_rows(self, new: Objective, combined: Objective) -> None:
        if self._chosen_by_data:
            self._fit(combined, progress_bar=False)
            return
        matrix = self.data_curvature_.matrix + _ggn_of(new, self.index_)
        self._set_curvature(DenseCurvature(matrix, exact_hessian=False), self.index_, combined)

    def evidence_function(self) -> EvidenceFunction:
        self._check_fitted()
        index, matrix = self.index_, self.data_curvature_.matrix

        def log_det(delta: Tensor, scale: Tensor) -> Tensor:
            return log_det_of_sum(matrix, delta[index], scale)

        return EvidenceFunction.of(self.objective_, log_det, index=index)

    def _log_det_at(self, delta: Tensor) -> Tensor:
        return self.data_curvature_.precision(delta[self.index_]).log_det()

    @property
    def _evidence_index(self) -> Tensor:
        return self.index_

    @exclusively
    def posterior_precision(self) -> Tensor:
        """Return the posterior precision A_S of the chosen weights as a dense matrix.

        Returns:
            (n, n), in 1/weight², over `index_`: the other weights are fixed, and have no precision.

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_fitted()
        return self.precision_.inner.multiply(self._unit_vectors())

    @exclusively
    def posterior_covariance(self) -> Tensor:
        """Return the posterior covariance A_S⁻¹ of the chosen weights as a dense matrix.

        Returns:
            (n, n), in weight², over `index_`: the other weights are fixed, and have a `posterior_variance` of 0.

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_fitted()
        covariance = self.precision_.inner.solve(self._unit_vectors())
        return 0.5 * (covariance + covariance.T)

    def _unit_vectors(self) -> Tensor:
        """Return the unit matrix (n, n); A_S of this size is stored."""
        return torch.eye(len(self.index_), dtype=self.theta_.dtype, device=self.theta_.device)

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        inner, theta = self.precision_.inner, self.theta_
        assert isinstance(inner, DensePrecision)
        return self.precision_.scattered(inner.sample(n_samples, generator).to(theta.dtype), len(theta))


def _checked_indices(value: object) -> Tensor | dict[str, Tensor] | None:
    """Return indices as a tensor, or masks by name. Raises OptionError for anything else."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        if value and all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in value.values()):
            return dict(value)
        raise _bad_indices(shown(value))
    try:
        index = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _bad_indices(shown(value)) from error
    whole = index.ndim == 1 and index.dtype in (torch.int32, torch.int64)
    if not whole or not len(index) or int(index.min()) < 0 or len(index.unique()) != len(index):
        raise _bad_indices(shown(value))
    return index.long()


def _given_index(given: Tensor | dict[str, Tensor], network: Network) -> Tensor:
    """Return the indices of S, ascending. Raises OptionError if they do not fit the parameters."""
    if isinstance(given, Tensor):
        if int(given.max()) >= network.n_parameters:
            raise _bad_indices(f"the index {int(given.max())} for {network.n_parameters} parameters")
        return given.to(network.theta.device).sort().values
    shapes = network.subset.shapes
    chosen = torch.zeros(network.n_parameters, dtype=torch.bool, device=network.theta.device)
    for name, mask in given.items():
        if name not in shapes or mask.shape != shapes[name]:
            raise _bad_indices(f"a mask of shape {tuple(mask.shape)} for {name!r}, among {dict(shapes)}")
        chosen[network.subset.slices[name]] = mask.to(chosen.device).flatten()
    if not bool(chosen.any()):
        raise _bad_indices("masks without a weight")
    return chosen.nonzero()[:, 0]


def _bad_indices(received: str) -> OptionError:
    return OptionError(
        "subnetwork_indices as different indices into the chosen parameters, or masks (bool) by parameter name",
        received=received,
        remedy='torch.tensor([0, 5, 7]), or {"0.weight": model[0].weight.abs() > 0.1}.',
    )


def _marginal_variance(objective: Objective) -> Tensor:
    """Return 1/(diag GGN + δ), (P,)."""
    with objective.network.pass_counter.phase("choice"):
        diagonal, _ = BUILDERS["ggn", "diag", "eigen"](objective.centred(curvature="ggn"), GGNOptions())
    precision = diagonal.precision(objective.prior.precision)
    return precision.solve(torch.ones_like(objective.theta)[None])[0]


def _ggn_of(objective: Objective, index: Tensor) -> Tensor:
    """Return (Σₙ Jₙᵀ Λₙ Jₙ)_SS, (n, n), without the prior."""
    total = objective.theta.new_zeros(len(index), len(index), dtype=algebra_dtype(objective.theta.device))
    for rows in ggn_rows(objective):
        add_gram(total, rows[:, index].to(total.dtype).T)
    mirror(total)
    return total
