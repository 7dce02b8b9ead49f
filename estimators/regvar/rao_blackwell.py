"""The exact block of posterior draws: the last layer, whose part of the variance has a closed form.

For a Gaussian posterior Var f = Var(E[f | θ_R]) + E[Var(f | θ_R)], L the block, R the rest. The second term is exactly
the last-layer Laplace variance; draws have to estimate only the first (Rao–Blackwell; docs/math.md, section 5).
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
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned

__all__ = ["ComposedBlock", "RaoBlackwellBlock", "find_rao_blackwell_block"]

_LARGEST = 8192  # entries of θ: a factorisation of seconds


@dataclass(frozen=True)
class RaoBlackwellBlock:
    """The last layer with its factored part A_LL of the precision."""

    head: LastLayer
    precision: FullLastLayer

    @property
    def mask(self) -> Tensor:
        """(P,) bool: true on L."""
        return self.head.mask

    def without_block(self, objective: Objective, xi: Tensor) -> Tensor:
        """ξ_R − A_RL A_LL⁻¹ ξ_L on R and 0 on L, for ξ (K, P): one product with A a draw."""
        k = len(xi)
        solved = self.precision.dense.solve(self.head.to_matrix(xi).reshape(k, -1))  # A_LL⁻¹ ξ_L
        embedded = self.head.to_theta(solved.reshape(k, self.head.n_outputs, self.head.n_features))
        with objective.network.pass_counter.phase("exact block"):
            return objective.product(embedded).neg_().add_(xi).masked_fill_(self.mask, 0.0)

    def state(self) -> Learned:
        """The factor and the layer."""
        return {"block": self.precision.dense.cholesky}, self.head.description()

    @classmethod
    def restored(cls, network: Network, cholesky: Tensor, description: dict[str, str | None]) -> RaoBlackwellBlock:
        """From `state()`."""
        head = LastLayer.described(network, description)
        shape = (head.n_outputs, head.n_features)
        return cls(head, FullLastLayer.factored(cholesky, shape))

    def variance(self, x: PyTree) -> Tensor:
        """(M, C), of the block alone."""
        return self.precision.variance(self.head.features(x))

    def covariance(self, x: PyTree) -> Tensor:
        """(M, C, C), of the block alone."""
        return self.precision.covariance(self.head.features(x))

    def response(self, coefficients: Tensor, x: PyTree) -> Tensor:
        """J_L u for u (K, C, E) in the layer: (K, M, C)."""
        return torch.einsum("kce,me->kmc", coefficients, self.head.features(x).to(coefficients.dtype))

    def sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        """Deviations (n_samples, M, C) of f by draws of the block given the rest."""
        return self.response(self.precision.sample(n_samples, generator), x)


@dataclass(frozen=True)
class ComposedBlock(RaoBlackwellBlock):
    """The same block, read through a function g of the outputs."""

    network: ComposedNetwork

    @classmethod
    def of(cls, block: RaoBlackwellBlock, of: Functional) -> Self:
        """`block` through g."""
        return cls(block.head, block.precision, ComposedNetwork(block.head.network, of))

    def variance(self, x: PyTree) -> Tensor:
        return variance_by_covariance(self.network.slopes(x), super().covariance(x))

    def covariance(self, x: PyTree) -> Tensor:
        slopes = self.network.slopes(x)
        return slopes @ super().covariance(x) @ slopes.transpose(1, 2)

    def response(self, coefficients: Tensor, x: PyTree) -> Tensor:
        response = super().response(coefficients, x)
        return torch.einsum("mdc,kmc->kmd", self.network.slopes(x).to(response.dtype), response)


def find_rao_blackwell_block(objective: Objective, choice: str | None) -> tuple[RaoBlackwellBlock | None, str]:
    """The block for "auto", "last_layer" or None, and in words which and why.

    "auto" steps aside where the last layer is not linear, trainable, untied, within the subset and small enough;
    "last_layer" raises there.
    """
    if choice is None:
        return None, "none: rao_blackwell=None"
    try:
        with objective.network.pass_counter.phase("exact block"):
            block = _factored(_usable_head(objective), objective)
    except EstimatorError as error:
        if choice == "last_layer":
            raise
        return None, f"none: expected {error.expected}, found {error.received}"
    head = block.head
    n = head.n_outputs * head.n_features
    name = head.layer.name or "the network itself"
    return block, f"last layer {name!r}: {n} of {objective.theta.numel()} parameters"


def _usable_head(objective: Objective) -> LastLayer:
    head = LastLayer.of(objective.network, next(iter(objective.batches)).x)
    inside = set(objective.network.subset.shapes)
    if not inside.issuperset(head.layer.parameter_names):
        raise _unusable("a last layer within subset_of_weights", f"{head.layer.name!r}, not or not all of it inside")
    n, element = head.n_outputs * head.n_features, objective.theta.element_size()
    if n == objective.theta.numel():
        raise _unusable("weights beside the last layer to draw", "a subset that is the last layer alone")
    if n > _LARGEST or 20 * n * n * element > objective.available_bytes():
        raise _unusable(f"a last layer of at most {_LARGEST} parameters that fits into memory", f"one of {n}")
    head.features(next(iter(objective.batches)).x)
    return head


def _unusable(expected: str, received: str) -> OptionError:
    return OptionError(expected, received=received, remedy='rao_blackwell=None or "auto".')


def _factored(head: LastLayer, objective: Objective) -> RaoBlackwellBlock:
    prior = head.to_matrix(objective.prior.precision)
    with objective.network.pass_counter.phase("exact block"):
        return RaoBlackwellBlock(head, FullLastLayer(head.full_curvature(objective), prior))
