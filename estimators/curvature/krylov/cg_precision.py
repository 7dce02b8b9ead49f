"""A posterior precision by products: every solve runs block CG over the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.curvature.krylov.block_cg import block_cg
from estimators.curvature.krylov.block_lanczos import FreeBytes, Product
from estimators.errors import IllConditionedError, UnsupportedError
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.reductions import dots
from estimators.runtime.memory import rows_per_chunk

__all__ = ["CGPrecision", "default_tolerance"]


class CGPrecision(Precision):
    """A by products A v; nothing of size P² is ever made.

    Args:
        product: v (K, P) -> A v (K, P).
        tol: the relative residual of a solve.
        max_iter: the largest number of iterations of a solve.
        free_bytes: the memory for the Krylov basis; None for the free memory of this process.
        smallest: a lower bound of the eigenvalues of A, 0 if none is known; None leaves products unchecked.
        in_float64: makes the same precision with products in float64. It is used from the first solve on whose products
            in float32 are not accurate enough.
    """

    def __init__(
        self,
        product: Product,
        *,
        tol: float,
        max_iter: int = 1000,
        free_bytes: FreeBytes | None = None,
        smallest: float | None = None,
        in_float64: Callable[[], CGPrecision] | None = None,
    ) -> None:
        self.product, self.tol, self.max_iter, self.free_bytes = product, tol, max_iter, free_bytes
        self.smallest, self._make_float64 = smallest, in_float64
        self._float64: CGPrecision | None = None

    def solve(self, vectors: Tensor) -> Tensor:
        return self._solved(vectors).to(vectors.dtype)

    def multiply(self, vectors: Tensor) -> Tensor:
        return self.product(vectors)

    def variance(self, jacobian: Tensor) -> Tensor:
        m, c, p = jacobian.shape
        rows = jacobian.reshape(m * c, p)
        return dots(rows, self._solved(rows)).view(m, c).to(jacobian.dtype)

    def _solved(self, vectors: Tensor) -> Tensor:
        """A⁻¹ v (K, P) for vectors v (K, P), in their dtype, or in float64 if that is needed."""
        if self._float64 is None:
            try:
                return self._solved_in_dtype(vectors)
            except IllConditionedError:
                if self._make_float64 is None:
                    raise
                self._float64 = self._make_float64()
        return self._float64._solved_in_dtype(to_algebra_dtype(vectors))

    def _solved_in_dtype(self, vectors: Tensor) -> Tensor:
        """A⁻¹ v (K, P), a chunk of right-hand sides at a time."""
        chunk = rows_per_chunk(64 * vectors.shape[1] * vectors.element_size(), budget=2**31)
        solve = partial(
            block_cg, tol=self.tol, max_iter=self.max_iter, free_bytes=self.free_bytes, smallest=self.smallest
        )
        return torch.cat([solve(self.product, part).solution for part in vectors.split(chunk)])

    def covariance(self, jacobian: Tensor) -> Tensor:
        m, c, p = jacobian.shape
        solved = self._solved(jacobian.reshape(m * c, p)).reshape(m, c, p)  # A⁻¹ Jᵀ
        covariance = to_algebra_dtype(jacobian) @ to_algebra_dtype(solved).transpose(1, 2)
        return (0.5 * (covariance + covariance.transpose(1, 2))).to(jacobian.dtype)

    def log_det(self) -> Tensor:
        raise UnsupportedError(
            "a factored precision for its determinant",
            received='inverse="cg"',
            remedy='use inverse="cholesky" or "dual" if they fit, or hessian_structure="kron"/"diag".',
        )


def default_tolerance(dtype: torch.dtype) -> float:
    """A relative residual that the dtype reaches with certainty: 1e-10 in float64, 1e-5 in float32."""
    return 1e-10 if dtype == torch.float64 else 1e-5
