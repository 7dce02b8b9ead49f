"""Rao-Blackwellisation of posterior draws over the last layer, whose part of the variance has a closed form.

For a Gaussian posterior, Var f = Var(E[f | θ_R]) + E[Var(f | θ_R)], where L is the last layer and R all other
parameters. The second term is exactly the last-layer Laplace variance, so that draws estimate only the first term
(docs/math.md, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from estimators.curvature.last_layer.features import LastLayer
from estimators.curvature.last_layer.precision import FullLastLayer
from estimators.errors import EstimatorError, OptionError
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.numerics.tracing import is_tracing
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned

__all__ = ["ComposedBlock", "RaoBlackwellBlock", "find_rao_blackwell_block"]

_MAX_PARAMETERS = 8192  # of the last layer: its Cholesky factorisation takes seconds
_COPIES = 20  # matrices of the size of A_LL that the factorisation and its checks may need in memory


@dataclass(frozen=True)
class RaoBlackwellBlock:
    """The last layer L and the factored block A_LL of the precision.

    Args:
        last_layer: the layer, a linear map of its features.
        precision: A_LL with its Cholesky factor.
    """

    last_layer: LastLayer
    precision: FullLastLayer

    @property
    def mask(self) -> Tensor:
        """Mask of the parameters of L, (P,) bool."""
        return self.last_layer.mask

    def rao_blackwellise(self, objective: Objective, xi: Tensor) -> Tensor:
        """Return ξ_R − A_RL A_LL⁻¹ ξ_L on R and 0 on L, for draws ξ (K, P); costs one product with A per draw."""
        k = len(xi)
        solved = self.precision.dense.solve(self.last_layer.to_matrix(xi).reshape(k, -1))  # A_LL⁻¹ ξ_L
        embedded = self.last_layer.to_theta(solved.reshape(k, self.last_layer.n_outputs, self.last_layer.n_features))
        with objective.network.pass_counter.phase("Rao-Blackwellisation"):
            return objective.product(embedded).neg_().add_(xi).masked_fill_(self.mask, 0.0)

    def state(self) -> Learned:
        """Return the Cholesky factor and the description of the layer."""
        return {"block": self.precision.dense.cholesky}, self.last_layer.description()

    @classmethod
    def restored(cls, network: Network, cholesky: Tensor, description: dict[str, str | None]) -> RaoBlackwellBlock:
        """Return the block that `state` describes."""
        layer = LastLayer.from_description(network, description)
        shape = (layer.n_outputs, layer.n_features)
        return cls(layer, FullLastLayer.factored(cholesky, shape))

    def features_in(self, jacobian: Tensor) -> Tensor | None:
        """Return the features φ (M, E) that a Jacobian (M, C, P) has as its entries of L; None if it has others.

        ∂f_c/∂W_d = δ_cd φ. The Jacobian has been compared with plain autograd, so that no forward pass is needed.
        """
        if is_tracing():  # nothing may be decided by values of a recorded query
            return None
        entries = self.last_layer.to_matrix(jacobian)  # (M, C, C, E)
        features = entries[:, 0, 0]
        expected = torch.diag_embed(features[..., None].expand(-1, -1, entries.shape[1])).permute(0, 2, 3, 1)
        return features if torch.equal(entries, expected) else None

    def variance(self, x: PyTree) -> Tensor:
        """Return the last-layer variance at x, (M, C)."""
        return self.precision.variance(self.last_layer.features(x))

    def covariance(self, x: PyTree) -> Tensor:
        """Return the last-layer covariance at x, (M, C, C)."""
        return self.precision.covariance(self.last_layer.features(x))

    def covariance_along(self, jacobian: Tensor) -> Tensor:
        """Return J_L A_LL⁻¹ J_Lᵀ (M, C, C) for J (M, C, P), differentiable in J."""
        return self.precision.dense.differentiable_covariance(self.last_layer.to_matrix(jacobian).flatten(2))

    def joint_covariance(self, x: PyTree) -> Tensor:
        """Return the last-layer covariance between all rows of x, (M, C, M, C)."""
        return self.precision.joint_covariance(self.last_layer.features(x))

    def response_along(self, coefficients: Tensor, jacobian: Tensor) -> Tensor:
        """Return J_L u for u in the layer (K, C, E) and J (M, C', P): (K, M, C'), differentiable in J."""
        return torch.einsum("kce,mdce->kmd", coefficients, self.last_layer.to_matrix(jacobian).to(coefficients.dtype))

    def sample_weights(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return samples (n_samples, P) of the layer given the other parameters, minus their mean; 0 outside."""
        return self.last_layer.to_theta(self.precision.sample(n_samples, generator))

    def response(self, coefficients: Tensor, x: PyTree) -> Tensor:
        """Return J_L(x) u for u in the layer, (K, C, E) with E features: (K, M, C)."""
        return self.response_at(coefficients, self.last_layer.features(x))

    @staticmethod
    def response_at(coefficients: Tensor, features: Tensor) -> Tensor:
        """Return `response` at known features φ (M, E)."""
        return torch.einsum("kce,me->kmc", coefficients, features.to(coefficients.dtype))

    def sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return J_L(x) u for samples u of the layer given the other parameters, (n_samples, M, C)."""
        return self.response(self.precision.sample(n_samples, generator), x)


@dataclass(frozen=True)
class ComposedBlock(RaoBlackwellBlock):
    """The last-layer part of the variance of g(f), g a function of the outputs of one row."""

    network: ComposedNetwork

    def features_in(self, jacobian: Tensor) -> None:
        """Return None: the entries of g∘f are not the features."""

    @classmethod
    def of(cls, block: RaoBlackwellBlock, of: Functional) -> Self:
        """Return the block of g∘f; `of` is g."""
        return cls(block.last_layer, block.precision, ComposedNetwork(block.last_layer.network, of))

    def variance(self, x: PyTree) -> Tensor:
        return variance_by_covariance(self.network.function_jacobian(x), super().covariance(x))

    def covariance(self, x: PyTree) -> Tensor:
        slopes = self.network.function_jacobian(x)
        return slopes @ super().covariance(x) @ slopes.transpose(1, 2)

    def response(self, coefficients: Tensor, x: PyTree) -> Tensor:
        response = super().response(coefficients, x)
        return torch.einsum("mdc,kmc->kmd", self.network.function_jacobian(x).to(response.dtype), response)


def find_rao_blackwell_block(objective: Objective, choice: str | None) -> tuple[RaoBlackwellBlock | None, str]:
    """Find the last layer to Rao-Blackwellise over.

    Args:
        objective: the centred objective.
        choice: "auto", "last_layer" or None, the option of PosteriorDraws.

    Returns:
        The block or None, and a text that names the layer or says why there is none.

    Raises:
        EstimatorError: with "last_layer", if the layer is not linear, trainable, untied, within the subset and small.
    """
    if choice is None:
        return None, "none: rao_blackwell=None"
    try:
        with objective.network.pass_counter.phase("Rao-Blackwellisation"):
            last = _usable_last_layer(objective)
            prior = last.to_matrix(objective.prior.precision)
            block = RaoBlackwellBlock(last, FullLastLayer(last.full_curvature(objective), prior))
    except EstimatorError as error:
        if choice == "last_layer":
            raise
        return None, f"none: expected {error.expected}, found {error.received}"
    n = last.n_outputs * last.n_features
    name = last.layer.name or "the network itself"
    return block, f"last layer {name!r}: {n} of {objective.theta.numel()} parameters"


def _usable_last_layer(objective: Objective) -> LastLayer:
    """Return the last layer, or raise an error that says why it cannot be used."""
    last = LastLayer.of(objective.network, next(iter(objective.batches)).x)
    subset = set(objective.network.subset.shapes)
    if not subset.issuperset(last.layer.parameter_names):
        raise _unusable("a last layer within subset_of_weights", f"{last.layer.name!r}, not or not all of it inside")
    n, element = last.n_outputs * last.n_features, objective.theta.element_size()
    if n == objective.theta.numel():
        raise _unusable("weights beside the last layer to draw", "a subset that is the last layer alone")
    if n > _MAX_PARAMETERS or _COPIES * n * n * element > objective.available_bytes():
        raise _unusable(f"a last layer of at most {_MAX_PARAMETERS} parameters that fits into memory", f"one of {n}")
    last.features(next(iter(objective.batches)).x)
    return last


def _unusable(expected: str, received: str) -> OptionError:
    return OptionError(expected, received=received, remedy='rao_blackwell=None or "auto".')
