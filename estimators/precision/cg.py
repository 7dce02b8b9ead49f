"""A as products only: every solve is a block CG run over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.memory import rows_per_chunk
from estimators.precision.base import Precision
from estimators.precision.block_cg import block_cg
from estimators.precision.block_lanczos import Free, Product

__all__ = ["CGPrecision", "default_tolerance"]


class CGPrecision(Precision):
    """A v by `product` (K, P) -> (K, P); nothing of size P² is ever made."""

    def __init__(self, product: Product, *, tol: float, max_iter: int = 1000, free: Free | None = None) -> None:
        self.product, self.tol, self.max_iter, self.free = product, tol, max_iter, free

    def solve(self, vectors: Tensor) -> Tensor:
        chunk = rows_per_chunk(64 * vectors.shape[1] * vectors.element_size(), budget=2**31)
        return torch.cat([self._solved(part) for part in vectors.split(chunk)])

    def _solved(self, vectors: Tensor) -> Tensor:
        return block_cg(self.product, vectors, tol=self.tol, max_iter=self.max_iter, free=self.free).solution

    def covariance(self, jacobian: Tensor) -> Tensor:
        m, c, p = jacobian.shape
        solved = self.solve(jacobian.reshape(m * c, p)).reshape(m, c, p)  # A⁻¹ Jᵀ
        covariance = jacobian @ solved.transpose(1, 2)
        return 0.5 * (covariance + covariance.transpose(1, 2))

    def log_det(self) -> Tensor:
        raise UnsupportedError(
            "a factored precision for its determinant",
            received='inverse="cg"',
            remedy='use inverse="cholesky" or "dual" where they fit, or hessian_structure="kron"/"diag".',
        )


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative residual that the dtype can reach with room to spare: 1e-10 in float64, 1e-5 in float32."""
    return 1e-10 if dtype == torch.float64 else 1e-5
