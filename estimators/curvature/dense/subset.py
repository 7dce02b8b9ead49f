"""The posterior precision of some entries of θ, with all others fixed."""

from __future__ import annotations

from torch import Tensor

from estimators.curvature.base import Precision

__all__ = ["ColumnPrecision"]


class ColumnPrecision(Precision):
    """A over the entries `index` (n,) of θ, by a precision `inner` of n entries; all others have no variance.

    J A⁻¹ Jᵀ takes the columns of J at `index`. By the Schur complement it is at most that of a posterior over all of θ.
    """

    def __init__(self, inner: Precision, index: Tensor) -> None:
        self.inner, self.index = inner, index

    def solve(self, vectors: Tensor) -> Tensor:
        return self.scattered(self.inner.solve(vectors[:, self.index]), vectors.shape[1])

    def multiply(self, vectors: Tensor) -> Tensor:
        return self.scattered(self.inner.multiply(vectors[:, self.index]), vectors.shape[1])

    def marginal_variance(self, theta: Tensor) -> Tensor:
        return self.scattered(self.inner.marginal_variance(theta[self.index])[None], len(theta))[0]

    def covariance(self, jacobian: Tensor) -> Tensor:
        return self.inner.covariance(jacobian[..., self.index])

    def variance(self, jacobian: Tensor) -> Tensor:
        return self.inner.variance(jacobian[..., self.index])

    def log_det(self) -> Tensor:
        return self.inner.log_det()

    def scattered(self, values: Tensor, n_parameters: int) -> Tensor:
        """Vectors (K, P) with values (K, n) at `index`, and 0 elsewhere."""
        return values.new_zeros(len(values), n_parameters).index_copy(1, self.index, values)
