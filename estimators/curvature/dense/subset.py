"""The precision of a few entries of θ, the others held where they are."""

from __future__ import annotations

from torch import Tensor

from estimators.curvature.base import Precision

__all__ = ["ColumnPrecision"]


class ColumnPrecision(Precision):
    """A over the entries `index` (n,) of θ, by a precision `inner` of n; the rest has no variance.

    J A⁻¹ Jᵀ takes the columns of J at `index`. By the Schur complement it is never above that of a posterior over all.
    """

    def __init__(self, inner: Precision, index: Tensor) -> None:
        self.inner, self.index = inner, index

    def solve(self, vectors: Tensor) -> Tensor:
        return self.placed(self.inner.solve(vectors[:, self.index]), vectors.shape[1])

    def covariance(self, jacobian: Tensor) -> Tensor:
        return self.inner.covariance(jacobian[..., self.index])

    def variance(self, jacobian: Tensor) -> Tensor:
        return self.inner.variance(jacobian[..., self.index])

    def log_det(self) -> Tensor:
        return self.inner.log_det()

    def placed(self, values: Tensor, n_parameters: int) -> Tensor:
        """(K, n) at their places in zeros (K, P)."""
        return values.new_zeros(len(values), n_parameters).index_copy(1, self.index, values)
