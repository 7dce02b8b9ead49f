"""A as products only: every solve is a block CG run over the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.curvature.krylov.block_cg import block_cg
from estimators.curvature.krylov.block_lanczos import Free, Product
from estimators.errors import IllConditionedError, UnsupportedError
from estimators.numerics.dtype import to_algebra_dtype
from estimators.runtime.memory import rows_per_chunk

__all__ = ["CGPrecision", "default_tolerance"]


class CGPrecision(Precision):
    """A v by `product` (K, P) -> (K, P); nothing of size P² is ever made.

    Args:
        smallest: a number that no eigenvalue of A is below, 0 where none is known; None leaves products unchecked.
        wider: makes the same precision with products in float64, which takes over for good where those in float32 are
            not accurate enough.
    """

    def __init__(
        self,
        product: Product,
        *,
        tol: float,
        max_iter: int = 1000,
        free: Free | None = None,
        smallest: float | None = None,
        wider: Callable[[], CGPrecision] | None = None,
    ) -> None:
        self.product, self.tol, self.max_iter, self.free = product, tol, max_iter, free
        self.smallest, self._make_wider = smallest, wider
        self._wider: CGPrecision | None = None

    def solve(self, vectors: Tensor) -> Tensor:
        return self._solved(vectors).to(vectors.dtype)

    def _solved(self, vectors: Tensor) -> Tensor:
        """A⁻¹ v of each of vectors (K, P): in their dtype, or in float64 where that was needed."""
        if self._wider is None:
            try:
                return self._solved_here(vectors)
            except IllConditionedError:
                if self._make_wider is None:
                    raise
                self._wider = self._make_wider()
        return self._wider._solved_here(to_algebra_dtype(vectors))

    def _solved_here(self, vectors: Tensor) -> Tensor:
        chunk = rows_per_chunk(64 * vectors.shape[1] * vectors.element_size(), budget=2**31)
        solve = partial(block_cg, tol=self.tol, max_iter=self.max_iter, free=self.free, smallest=self.smallest)
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
            remedy='use inverse="cholesky" or "dual" where they fit, or hessian_structure="kron"/"diag".',
        )


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative residual that the dtype can reach with room to spare: 1e-10 in float64, 1e-5 in float32."""
    return 1e-10 if dtype == torch.float64 else 1e-5
