"""Last-layer Laplace in closed form on features, independent of LinearizedLaplace over the last layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from estimators.curvature.base import Precision
from estimators.curvature.joining import not_a_sum
from estimators.curvature.last_layer.features import LastLayer
from estimators.curvature.last_layer.precision import DiagLastLayer, FullLastLayer, KronLastLayer, LastLayerPrecision
from estimators.curvature.last_layer.weights import LastLayerWeights
from estimators.errors import OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import PriorOptions, inherits_options
from estimators.laplace.evidence import EvidenceFunction, log_det_of_sum
from estimators.laplace.evidence_mixin import EvidenceMixin
from estimators.laplace.updating import UpdateMixin
from estimators.likelihoods import Likelihood
from estimators.models.feature_reduction import FeatureReduction, checked_reduction
from estimators.models.functionals import Functional
from estimators.models.last_linear import find_last_linear
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree, without_graph
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_instance
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory

__all__ = ["LastLayerLaplace"]

Factors = dict[str, Tensor]


class LastLayerLaplace(UpdateMixin, EvidenceMixin):
    """Laplace over the last linear layer f = Wφ + b (Kristiadi et al. 2020; Daxberger et al. 2021, section 2).

        full: A = Σₙ Λₙ ⊗ φₙφₙᵀ + δ       kron: A = mean Λ ⊗ Σ φφᵀ + δ I       diag: the diagonal of the full one

    If the layer is used at several positions of a row, such as tokens, n counts the positions with a label. Variances
    and samples then exist, but not covariances between the outputs of a row.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "last_layer", the only possible value.
        hessian_structure: "full", "kron" (one δ for the whole layer) or "diag".
        last_layer_name: the name of the layer. None: found by running the network.
        feature_reduction: for a network that applies the layer to every position (token) of a row and returns one
            output per row: "pick_last" (the last token that is not padding, as the sequence classifiers of
            transformers with causal attention), "pick_first", "average" (over the tokens of "attention_mask"), or a
            function (features (B, T, D), inputs) -> (B, D). `fit` raises NoLastLayerError if the network does
            something else. None: the layer's outputs are those of the network.

    Attributes:
        last_layer_: the layer, its features and its positions.
        precision_: A, of the chosen structure.

    Raises:
        OptionError: for an unknown structure, or another subset of weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> laplace = LastLayerLaplace(model, "classification")
        >>> laplace = laplace.fit([(torch.randn(20, 3), torch.randint(0, 2, (20,)))])
        >>> laplace.variance(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """

    export_route = "batch"
    uses_prior_precision = True

    @inherits_options(UncertaintyEstimator, PriorOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        subset_of_weights: str = "last_layer",
        hessian_structure: str = "full",
        last_layer_name: str | None = None,
        feature_reduction: FeatureReduction | None = None,
        **prior: Unpack[PriorOptions],
    ) -> None:
        super().__init__(model, likelihood, subset_of_weights=subset_of_weights, **prior)
        self.hessian_structure, self.last_layer_name = hessian_structure, last_layer_name
        if subset_of_weights != "last_layer":
            raise OptionError(
                'subset_of_weights="last_layer"', received=repr(subset_of_weights), remedy="use LinearizedLaplace."
            )
        remedy = '"full" where (C·(D+1))² numbers fit into memory, else "kron".'
        checked_choice("hessian_structure", hessian_structure, sorted(_STRUCTURES), remedy=remedy)
        self.feature_reduction = checked_reduction(feature_reduction)
        if last_layer_name is not None:
            checked_instance("last_layer_name", last_layer_name, str, remedy="the name of a layer, or None.")

    def _parameter_names(self, train_loader: Iterable[Any]) -> list[str]:
        first = self._first_inputs(train_loader)
        options = {"name": self.last_layer_name, "feature_reduction": self.feature_reduction}
        return find_last_linear(self.model, first, **options).parameter_names  # type: ignore[arg-type]

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        first = next(iter(objective.batches))
        self.last_layer_ = LastLayer.of(
            objective.network, first.x, name=self.last_layer_name, feature_reduction=self.feature_reduction
        )
        self._set_factors(_STRUCTURES[self.hessian_structure].collect(self.last_layer_, objective), objective)

    def _last_layer_of(self, objective: Objective, description: dict[str, str | None]) -> LastLayer:
        return LastLayer.from_description(objective.network, description, self.feature_reduction)

    def _precision_for(self, factors: Factors, prior_precision: Tensor) -> LastLayerPrecision:
        prior = self.last_layer_.to_matrix(prior_precision)
        return _STRUCTURES[self.hessian_structure].precision(factors, prior)

    @property
    def keeps_curvature(self) -> bool:
        """Whether the fit has the data's curvature: always."""
        return True

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:
        ratio = fitted._curvature_ratio(self, changed)
        if ratio is None:
            self._fit(objective, progress_bar=False)
            return
        self.last_layer_ = self._last_layer_of(objective, fitted.last_layer_.description())
        scaled = _STRUCTURES[self.hessian_structure].scaled
        factors = {name: ratio * t if name == scaled else t for name, t in fitted.factors_.items()}
        self._set_factors(factors, objective)

    def _get_fit_state(self) -> Learned:
        return self.factors_, {"last_layer": self.last_layer_.description()}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.last_layer_ = self._last_layer_of(objective, learned["last_layer"])
        self._set_factors(tensors, objective)

    def _check_updatable(self) -> None:
        if self.hessian_structure == "kron":  # a product of two sums
            raise not_a_sum('hessian_structure="kron"')

    def _add_rows(self, new: Objective, combined: Objective) -> None:
        added = _STRUCTURES[self.hessian_structure].collect(self.last_layer_, new)
        factors = {name: factor + added[name] for name, factor in self.factors_.items()}
        self._set_factors(factors, combined)

    def _set_factors(self, factors: Factors, objective: Objective) -> None:
        """Set the factors and A; neither if A cannot be computed."""
        precision = self._precision_for(factors, objective.prior.precision)
        self.factors_, self.precision_ = factors, precision

    def _checked_variance(self, x: PyTree) -> Tensor:
        self._check_fitted()
        with self.last_layer_.capture_features(x) as features:  # from the forward pass of the check
            f = self._checked_outputs(x)
        self.last_layer_.check(x, f, features)
        return self.precision_.variance(features.at_positions.flatten(0, -2)).reshape(f.shape)

    def _variance(self, x: PyTree) -> Tensor:
        return self._checked_variance(x).flatten(1)

    def _export_moments(self, x: PyTree) -> tuple[Tensor, Tensor]:
        with self.last_layer_.capture_features(x) as features:
            mean = self._mean(x)
        variance = self.precision_.variance(features.at_positions.flatten(0, -2)).reshape(mean.shape)
        return mean, self._to_output_dtype(variance)

    def _covariance(self, x: PyTree) -> Tensor:
        return self.precision_.covariance(self.last_layer_.features(x))

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        displaced = self.precision_.sample(n_samples, generator)
        with self.last_layer_.capture_features(x) as features:
            f = self.network_.shaped_outputs(x)
        self.last_layer_.check(x, f, features)
        response = torch.einsum("kce,m...e->km...c", displaced, features.at_positions.to(displaced.dtype)).flatten(2)
        return f.flatten(1) + response.to(f.dtype)

    def evidence_function(self) -> EvidenceFunction:
        self._check_fitted()
        return EvidenceFunction.of(self.objective_, partial(_log_det_of, self.last_layer_, self.factors_))

    def _log_det_at(self, delta: Tensor) -> Tensor:
        is_fitted = delta is self.objective_.prior.precision
        return (self.precision_ if is_fitted else self._precision_for(self.factors_, delta)).log_det()

    def _weight_precision(self) -> Precision:
        return LastLayerWeights(self.last_layer_, self.precision_)

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        return self.last_layer_.to_theta(self.precision_.sample(n_samples, generator))

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:
        with self.last_layer_.capture_features(x) as features:
            shaped = self.network_.shaped_outputs(x)
        self.last_layer_.check(x, shaped, features)
        covariance = self.precision_.joint_covariance(features.at_positions.flatten(0, -2))
        return covariance.reshape(*f.shape, *f.shape)  # all outputs of all positions of a row together

    def _variance_with_graph(self, x: PyTree, of: Functional | None) -> Tensor:
        if of is not None:
            return super()._variance_with_graph(x, of)
        with self.last_layer_.capture_features(x) as features:
            f = self.network_.shaped_with_graph(x)
        self.last_layer_.check(without_graph(x), f.detach(), features)
        return self.precision_.variance(features.with_graph.flatten(0, -2)).reshape(f.shape).flatten(1)


def _log_det_of(layer: LastLayer, factors: Factors, delta: Tensor, scale: Tensor) -> Tensor:
    """Return log |scale · G + diag δ| of a last layer, differentiable, from the factors of its structure."""
    prior = layer.to_matrix(delta)
    if "curvature" in factors:
        return log_det_of_sum(factors["curvature"].reshape(prior.numel(), -1), prior.flatten(), scale)
    if "diagonal" in factors:
        return (scale * factors["diagonal"] + prior).log().sum()
    of_outputs, of_features = (torch.linalg.eigvalsh(factors[name]).clamp_min(0) for name in ("mean_hessian", "gram"))
    _single(prior.detach())
    return (scale * torch.outer(of_outputs, of_features) + prior[0, 0]).log().sum()


@dataclass(frozen=True)
class _Structure:
    """How to compute the factors of the data's curvature, and the precision from them for a prior (C, E).

    `scaled` names the factor that is proportional to Λ.
    """

    scaled: str
    collect: Callable[[LastLayer, Objective], Factors]
    precision: Callable[[Factors, Tensor], LastLayerPrecision]


def _full(layer: LastLayer, objective: Objective) -> Factors:
    n = layer.n_outputs * layer.n_features
    check_fits_memory(
        f"a full last-layer precision of {n} parameters",
        5 * n * n * algebra_dtype(objective.theta.device).itemsize,
        device=objective.theta.device,
        remedy='hessian_structure="kron" or "diag".',
    )
    return {"curvature": layer.full_curvature(objective)}


def _kron(layer: LastLayer, objective: Objective) -> Factors:
    mean_hessian, gram = layer.kron_factors(objective)
    return {"mean_hessian": mean_hessian, "gram": gram}


def _diag(layer: LastLayer, objective: Objective) -> Factors:
    return {"diagonal": layer.diagonal(objective)}


def _single(prior: Tensor) -> float:
    if float(prior.min()) != float(prior.max()):
        raise OptionError(
            'one prior_precision for the whole last layer with hessian_structure="kron"',
            received=f"values from {float(prior.min()):g} to {float(prior.max()):g}",
            remedy='hessian_structure="full" or "diag", or one number.',
        )
    return float(prior.min())


_STRUCTURES: dict[str, _Structure] = {
    "full": _Structure("curvature", _full, lambda factors, prior: FullLastLayer(factors["curvature"], prior)),
    "kron": _Structure(
        "mean_hessian",
        _kron,
        lambda factors, prior: KronLastLayer(factors["mean_hessian"], factors["gram"], _single(prior)),
    ),
    "diag": _Structure("diagonal", _diag, lambda factors, prior: DiagLastLayer(factors["diagonal"], prior)),
}
