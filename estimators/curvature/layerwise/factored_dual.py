"""A = D + RᵀR in its dual form with rows in factors, from which inner products of rows are computed.

D = diag(δ) is the prior precision, and R has the rows SᵀJ of the training data, with Λ = SSᵀ the Hessian of −log p in
the outputs. With L Lᵀ = I + R D⁻¹ Rᵀ, the variance of a query is its prior variance less the square of L⁻¹ R D⁻¹ Jᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from estimators.curvature.dense.dual import FunctionSpace
from estimators.curvature.fisher import EXACT, Fisher
from estimators.curvature.layerwise.factored_rows import FactoredRows
from estimators.curvature.layerwise.whitened_rows import whitened_rows
from estimators.errors import UnsupportedError
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.runtime.memory import rows_per_chunk

__all__ = ["FactoredDual", "bytes_needed", "factored_rows", "in_factors"]

_LEAST_PARAMETERS = 500
"""Below it, whole rows are faster."""


class FactoredDual(FunctionSpace):
    """A = D + RᵀR with rows R (N·C, P) in factors; everything is computed in their dtype."""

    def __init__(self, prior_precision: Tensor, rows: FactoredRows) -> None:
        self.rows, self.deltas = rows, rows.deltas(prior_precision.to(rows.other_rows.dtype))
        super().__init__(prior_precision, rows.inner(rows, self.deltas))

    def rows_times(self, vectors: Tensor) -> Tensor:
        return self.rows.times(vectors)

    def transposed_times(self, coefficients: Tensor) -> Tensor:
        return self.rows.transposed_times(coefficients)

    def variance_at(self, network: Network, x: PyTree) -> Tensor:
        def variance(query: FactoredRows, removed: Tensor) -> Tensor:
            return query.prior_variance(self.deltas) - removed.square().sum(0)

        with suppress(UnsupportedError):
            return self._read(network, x, variance)
        return super().variance_at(network, x)

    def covariance_at(self, network: Network, x: PyTree) -> Tensor:
        def covariance(query: FactoredRows, removed: Tensor) -> Tensor:
            return query.self_products(self.deltas) - torch.einsum("rmc,rmk->mck", removed, removed)

        with suppress(UnsupportedError):
            return self._read(network, x, covariance)
        return super().covariance_at(network, x)

    def _read(self, network: Network, x: PyTree, read: Callable[[FactoredRows, Tensor], Tensor]) -> Tensor:
        """Apply `read` to chunks of queries and their L⁻¹ R D⁻¹ Jᵀ (N·C, m, C), and join the results.

        Raises:
            UnsupportedError: a query does not use each map at one position.
        """
        # At most four times N·C numbers per query and output: the products, `removed`, and temporaries of either.
        chunk = rows_per_chunk(4 * len(self.cholesky) * self.rows.shape[1] * self.cholesky.element_size())
        parts = []
        for rows in LayerwiseJacobian(network, x, self.rows.layout.maps).rows_at(x):
            for query in FactoredRows.joined(self.rows.layout, [rows], self.cholesky.dtype).split(chunk):
                products = self.rows.inner(query, self.deltas)
                removed = torch.linalg.solve_triangular(self.cholesky, products, upper=False)
                parts.append(read(query, removed.unflatten(1, query.shape)))
        return torch.cat(parts).to(network.theta.dtype)


def in_factors(layers: LayerwiseJacobian) -> bool:
    """Whether rows are stored in factors: there are many parameters, and each is used once per row."""
    return layers.network.n_parameters >= _LEAST_PARAMETERS and layers.no_weight_sharing


def factored_rows(objective: Objective, layers: LayerwiseJacobian, fisher: Fisher = EXACT) -> FactoredRows:
    """R at the training rows in factors, in `algebra_dtype`."""
    dtype = algebra_dtype(objective.theta.device)
    return FactoredRows.joined(layers.layout, whitened_rows(objective, layers, fisher), dtype)


def bytes_needed(
    n_data: int, n_outputs: int, n_parameters: int, maps: Sequence[tuple[int, int]], element_size: int
) -> int:
    """Memory in bytes of the factors of maps (O, E), the other rows and a copy of both, and three matrices.

    The matrices (N·C, N·C) are the inner matrix, its Cholesky factor, and a temporary.
    """
    factors = sum(e + n_outputs * o for o, e in maps)
    others = n_outputs * (n_parameters - sum(o * e for o, e in maps))
    return (2 * n_data * (factors + others) + 3 * (n_data * n_outputs) ** 2) * element_size
