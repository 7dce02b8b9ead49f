"""The last linear layer as a function of its features: what the closed forms and the exact block of RegVar share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from estimators.errors import UnsupportedError
from estimators.last_linear import LastLinear, find_last_linear
from estimators.network import Network
from estimators.objective import Objective
from estimators.precision.dtype import algebra_dtype
from estimators.pytrees import PyTree

__all__ = ["Head"]


@dataclass(frozen=True)
class Head:
    """A last layer f = Wφ + b: its features, and its part of θ as a matrix (C, E), E = D, or D + 1 with a bias."""

    network: Network
    layer: LastLinear
    n_outputs: int
    n_features: int

    @classmethod
    def of(cls, network: Network, x: PyTree, *, name: str | None = None) -> Head:
        """The head that produces the outputs on x. Errors: ModelError, UnsupportedError."""
        with network.ledger.calls_of(network.module):
            return cls.described(network, asdict(find_last_linear(network.module, x, name=name)))

    @classmethod
    def described(cls, network: Network, description: dict[str, str | None]) -> Head:
        """The head of a `description()`."""
        layer = LastLinear(**description)  # type: ignore[arg-type]
        linear = network.module.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        return cls(network, layer, linear.out_features, linear.in_features + (layer.bias is not None))

    def description(self) -> dict[str, str | None]:
        """The layer by its names."""
        return asdict(self.layer)

    def features(self, x: PyTree) -> Tensor:
        """φ (M, E) at θ̂, with a 1 appended where the bias is a parameter."""
        return self.outputs_and_features(x)[1]

    def outputs_and_features(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """f (M, C) and φ (M, E) at θ̂, by one forward."""
        with self.listening() as heard:
            f = self.network.outputs(x)
        return f, heard.features

    @contextmanager
    def listening(self) -> Iterator[Heard]:
        """The features of the forwards within."""
        heard = Heard(bias=self.layer.bias is not None)
        hook = self.network.module.get_submodule(self.layer.name).register_forward_pre_hook(heard)
        try:
            yield heard
        finally:
            hook.remove()

    def to_matrix(self, theta: Tensor) -> Tensor:
        """The layer's entries of vectors (..., P) as (..., C, E)."""
        places = self.network.subset.slices
        weight: Tensor = theta[..., places[self.layer.weight]].unflatten(-1, (self.n_outputs, -1))
        if self.layer.bias is None:
            return weight
        return torch.cat([weight, theta[..., places[self.layer.bias], None]], dim=-1)

    def to_theta(self, matrix: Tensor) -> Tensor:
        """(..., C, E) -> (..., P), zero outside the layer."""
        places = self.network.subset.slices
        theta = matrix.new_zeros(*matrix.shape[:-2], self.network.n_parameters)
        weight = matrix if self.layer.bias is None else matrix[..., :-1]
        theta[..., places[self.layer.weight]] = weight.flatten(-2)
        if self.layer.bias is not None:
            theta[..., places[self.layer.bias]] = matrix[..., -1]
        return theta

    @property
    def mask(self) -> Tensor:
        """(P,) bool: the layer's entries of θ."""
        return self.network.subset.mask(self.layer.parameter_names).to(self.network.theta.device)

    def full_curvature(self, objective: Objective) -> Tensor:
        """Σₙ Λₙ ⊗ φₙφₙᵀ, (C, E, C, E), in `algebra_dtype`."""
        c, e = self.n_outputs, self.n_features
        total = objective.theta.new_zeros(c * c, e * e, dtype=algebra_dtype(objective.theta.device))
        chunk = max(1, 2**24 // (e * e))
        for hessian, features in self._hessians_and_features(objective):
            for lam, phi in zip(hessian.split(chunk), features.split(chunk), strict=True):
                wide = phi.to(total.dtype)
                outer = wide[:, :, None] * wide[:, None, :]
                total.addmm_(lam.to(total.dtype).reshape(-1, c * c).T, outer.reshape(-1, e * e))
        return total.reshape(c, c, e, e).permute(0, 2, 1, 3)

    def kron_factors(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """mean Λ (C, C) and Σ φφᵀ (E, E)."""
        theta = objective.theta
        mean_hessian = theta.new_zeros(self.n_outputs, self.n_outputs)
        gram = theta.new_zeros(self.n_features, self.n_features)
        for batch in objective.batches:
            f, features = self.outputs_and_features(batch.x)
            gram += features.T @ features
            mean_hessian += objective.likelihood.hessian_sum(f)
        return mean_hessian / objective.batches.n_data, gram

    def diagonal(self, objective: Objective) -> Tensor:
        """Σₙ Λₙ,cc φₙₑ², (C, E)."""
        total = objective.theta.new_zeros(self.n_outputs, self.n_features)
        for batch in objective.batches:
            f, features = self.outputs_and_features(batch.x)
            total += objective.likelihood.hessian_diagonal(f).T @ features.square()
        return total

    def _hessians_and_features(self, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in objective.batches:
            f, features = self.outputs_and_features(batch.x)
            yield objective.likelihood.hessian(f), features


class Heard:
    """A forward hook that keeps what the layer was last given."""

    def __init__(self, *, bias: bool) -> None:
        self._bias = bias
        self._last: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self._last = arguments[0].clone()

    @property
    def features(self) -> Tensor:
        """φ (M, E), with a 1 appended where the bias is a parameter. Errors: UnsupportedError for another shape."""
        features = self.at_places
        if features.ndim != 2:
            raise UnsupportedError(
                "features of shape (B, D) before the last layer",
                received=f"{features.ndim} dimensions",
                remedy='use LinearizedLaplace with subset_of_weights="last_layer".',
            )
        return features

    @property
    def at_places(self) -> Tensor:
        """φ (M, ..., E) of a layer that is used at several places of a row, likewise."""
        assert self._last is not None
        features = self._last.detach()
        return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1) if self._bias else features
