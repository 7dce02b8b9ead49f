"""Posterior draws of the weights as draws of the function, at any rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.func import vmap

from estimators.curvature.last_layer.features import LastLayer
from estimators.errors import EstimatorError, NoLastLayerError
from estimators.models.failures import FAILURES
from estimators.models.kernels import differentiable
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, n_rows, split_rows, with_floats
from estimators.persistence.state import Learned
from estimators.runtime.memory import rows_per_chunk
from estimators.sampling.collapsed import Conditional, features_at, frozen_bias

__all__ = ["FunctionDraws", "WeightDraws"]

_ROWS_PER_CALL = 2**14
"""Rows times draws in one vectorised forward."""
_COPIES = 6
"""Tensors of the size of all draws at some rows that their diagnostics need at a time."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference between outputs of one draw in a vectorised call and alone, or of Wφ + b."""


@dataclass(frozen=True)
class FunctionDraws:
    """Draws of the outputs at M rows from K chains with S draws each.

    Attributes:
        f: outputs, (K, S, M, C).
        conditional_mean: mean of f given the weights outside the last layer, (K, S, M, C), if that was integrated out.
        whitened: L⁻¹φ, (K, S, C or 1, E, M), whose inner products are covariances given the other weights.
    """

    f: Tensor
    conditional_mean: Tensor | None = None
    whitened: Tensor | None = None

    def moments(self, chains: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return mean and variance (M, C) over the draws of some chains, Rao–Blackwellised if possible.

        Var f = Var(E[f | R]) + E[Var(f | R)], R the weights outside the last layer.

        Args:
            chains: which chains.
        """
        if self.conditional_mean is None or self.whitened is None:
            f = self.f[chains].flatten(0, 1)
            return f.mean(0), f.var(0)
        mean = self.conditional_mean[chains].flatten(0, 1)
        within = self.whitened[chains].square().sum(3).mean((0, 1))  # E[φᵀA⁻¹φ], (C or 1, M)
        return mean.mean(0), mean.var(0) + within.mT

    def covariance(self) -> Tensor:
        """Return the covariance between the outputs of each row, (M, C, C), Rao–Blackwellised if possible."""
        if self.conditional_mean is None:
            return _covariance(self.f.flatten(0, 1), "smc,smd->mcd")
        within = self.moments()[1] - self.conditional_mean.flatten(0, 1).var(0)  # the outputs are independent given R
        return _covariance(self.conditional_mean.flatten(0, 1), "smc,smd->mcd") + torch.diag_embed(within)

    def joint_covariance(self) -> Tensor:
        """Return the covariance between all outputs of all rows, (M, C, M, C), Rao–Blackwellised if possible."""
        if self.conditional_mean is None or self.whitened is None:
            return _covariance(self.f.flatten(0, 1), "smc,snd->mcnd")
        mean, root = self.conditional_mean.flatten(0, 1), self.whitened.flatten(0, 1)
        within = torch.einsum("scem,scen->cmn", root, root) / len(root)
        within = torch.diag_embed(within.expand(mean.shape[-1], -1, -1).permute(1, 2, 0))  # (M, M, C, C)
        return _covariance(mean, "smc,snd->mcnd") + within.transpose(1, 2)


def _covariance(draws: Tensor, product: str) -> Tensor:
    deviations = draws - draws.mean(0)
    return torch.einsum(product, deviations, deviations) / (len(draws) - 1)


@dataclass(frozen=True)
class WeightDraws:
    """Draws of the weights from K chains with S draws each, and the distribution of a layer that was integrated out.

    Args:
        network: the network, in the dtype of the draws.
        weights: θ, (K, S, P).
        layer: the last layer, if it was integrated out.
        center: its mean given the other weights, (K, S, C, E).
        factor: lower triangles of the Cholesky factors of its precision, (K, S, C or 1, E(E+1)/2).
    """

    network: Network
    weights: Tensor
    layer: LastLayer | None = None
    center: Tensor | None = None
    factor: Tensor | None = None

    @classmethod
    def of(cls, network: Network, weights: Tensor, layer: LastLayer, conditional: Conditional) -> Self:
        """Return draws with a last layer that was integrated out.

        Args:
            network: the network.
            weights: θ, (K, S, P).
            layer: the last layer.
            conditional: the layer given the other weights, of K·S draws, those of a chain in a row.
        """
        rows, columns = torch.tril_indices(*conditional.factor.shape[-2:])
        shape = weights.shape[:2]
        packed = conditional.factor[..., rows, columns].unflatten(0, shape)
        return cls(network, weights, layer, conditional.mean.unflatten(0, shape), packed)

    def __len__(self) -> int:
        """Return K·S, the number of draws."""
        return self.weights.shape[0] * self.weights.shape[1]

    def state(self) -> Learned:
        """Return the draws as plain data, for `restored`."""
        tensors = {"weights": self.weights}
        if self.layer is None or self.center is None or self.factor is None:
            return tensors, {"layer": None}
        return {**tensors, "center": self.center, "factor": self.factor}, {"layer": self.layer.description()}

    @classmethod
    def restored(cls, network: Network, tensors: dict[str, Tensor], layer: dict[str, str | None] | None) -> Self:
        """Return the draws of a `state`."""
        if layer is None:
            return cls(network, tensors["weights"])
        described = LastLayer.from_description(network, layer)
        return cls(network, tensors["weights"], described, tensors["center"], tensors["factor"])

    def chunks(self, x: PyTree, n_outputs: int) -> Iterator[tuple[PyTree, FunctionDraws]]:
        """Yield rows of x, as many as fit into memory with all draws, with the draws of their outputs.

        Args:
            x: M query rows.
            n_outputs: C.
        """
        row_bytes = _COPIES * len(self) * n_outputs * self.weights.element_size()
        if self.layer is not None:
            row_bytes += len(self) * self.layer.n_features * n_outputs * self.weights.element_size()
        for rows in split_rows(x, rows_per_chunk(row_bytes)):
            yield rows, self.at(rows)

    def at(self, x: PyTree) -> FunctionDraws:
        """Return the draws of the outputs at x, all of them at a time.

        Args:
            x: M query rows.

        Raises:
            NoLastLayerError: the last layer was integrated out, and does not end the network at x.
        """
        if self.layer is None or self.center is None or self.factor is None:
            return FunctionDraws(self.outputs(x, self.weights.flatten(0, 1)).unflatten(0, self.weights.shape[:2]))
        layer, shape = self.layer, self.weights.shape[:2]
        f, features = self._outputs(x, self.weights.flatten(0, 1), layer)
        assert features is not None
        self._check_last_layer(f, features, layer)
        conditional = Conditional(self.center.flatten(0, 1), _unpacked(self.factor.flatten(0, 1), layer.n_features))
        mean = conditional.means(features) + frozen_bias(layer, f)
        whitened = conditional.whitened(features)
        return FunctionDraws(*(part.unflatten(0, shape) for part in (f, mean, whitened)))

    def outputs(self, x: PyTree, weights: Tensor) -> Tensor:
        """Return the outputs f (S, M, C) at x for weights (S, P)."""
        return self._outputs(x, weights, None)[0]

    def _outputs(self, x: PyTree, weights: Tensor, layer: LastLayer | None) -> tuple[Tensor, Tensor | None]:
        """Return f (S, M, C) and the features (S, M, E) of a layer, vectorised over draws where that is right."""
        x = with_floats(x, weights.dtype)

        def one(theta: Tensor) -> tuple[Tensor, ...]:
            return (self.network(theta, x),) if layer is None else features_at(layer, theta, x)

        with torch.no_grad(), differentiable():
            parts = self._vectorised(one, weights, max(1, _ROWS_PER_CALL // max(1, n_rows(x))))
            if parts is None:
                parts = [torch.stack(some) for some in zip(*map(one, weights), strict=True)]
        return parts[0], parts[1] if len(parts) > 1 else None

    def _vectorised(self, one: Any, weights: Tensor, size: int) -> list[Tensor] | None:  # noqa: ANN401
        """Return what `one` returns for all weights; None if a vectorised call fails, or differs for the first draw."""
        try:
            parts: list[Tensor] = list(vmap(one, chunk_size=size)(weights))
        except EstimatorError:
            raise
        except FAILURES:
            return None
        alone = one(weights[0])
        return parts if all(map(_close, (part[0] for part in parts), alone)) else None

    def _check_last_layer(self, f: Tensor, features: Tensor, layer: LastLayer) -> None:
        matrix = layer.to_matrix(self.weights.flatten(0, 1))
        expected = torch.einsum("sme,sce->smc", features, matrix) + frozen_bias(layer, f)
        if not _close(f, expected):
            raise NoLastLayerError(
                f"a last layer {layer.layer.name!r} that ends the network at every row",
                received="rows at which other operations follow it",
                remedy="collapse=None, which samples all weights.",
            )


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-30)
    return bool(((found - expected).abs() <= _TOLERANCE[found.dtype] * scale).all())


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """Return lower triangular matrices (..., E, E) of their entries (..., E(E+1)/2)."""
    rows, columns = torch.tril_indices(size, size)
    matrices = packed.new_zeros(*packed.shape[:-1], size, size)
    matrices[..., rows, columns] = packed
    return matrices
