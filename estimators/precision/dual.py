"""A = D + RᵀR in its dual (function-space) form: small where rows N·C are fewer than parameters P."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.precision.base import Precision
from estimators.precision.symmetric import gram

__all__ = ["DualPrecision", "bytes_needed"]


class DualPrecision(Precision):
    """D = diag δ > 0 and R (N·C, P) the GGN rows SᵀJ (docs/math.md, section 2); computed in the dtype of R.

    A⁻¹ = D⁻¹ − D⁻¹Rᵀ (I + R D⁻¹ Rᵀ)⁻¹ R D⁻¹          (Woodbury)
    log|A| = Σ log δ + log|I + R D⁻¹ Rᵀ|
    """

    def __init__(self, prior_precision: Tensor, rows: Tensor) -> None:
        self.prior_precision, self.rows = prior_precision.to(rows.dtype), rows
        inner = gram(rows * self.prior_precision.rsqrt())  # R D⁻¹ Rᵀ
        inner.diagonal().add_(1.0)
        self.cholesky = torch.linalg.cholesky(inner)

    def solve(self, vectors: Tensor) -> Tensor:
        scaled = vectors.to(self.rows.dtype) / self.prior_precision  # D⁻¹ v
        inner = torch.cholesky_solve(self.rows @ scaled.T, self.cholesky)  # (I + R D⁻¹Rᵀ)⁻¹ R D⁻¹ v
        return (scaled - (inner.T @ self.rows) / self.prior_precision).to(vectors.dtype)

    def covariance(self, jacobian: Tensor) -> Tensor:
        scaled, removed = self._prior_and_removed(jacobian)
        prior = scaled @ jacobian.to(scaled.dtype).transpose(1, 2)
        return (prior - removed.transpose(1, 2) @ removed).to(jacobian.dtype)

    def variance(self, jacobian: Tensor) -> Tensor:
        scaled, removed = self._prior_and_removed(jacobian)
        return ((scaled * jacobian).sum(-1) - removed.square().sum(1)).to(jacobian.dtype)

    def _prior_and_removed(self, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """J D⁻¹ (M, C, P), and L⁻¹ R D⁻¹ Jᵀ (M, N·C, C): what the data take away from the prior variance."""
        m, c, p = jacobian.shape
        scaled = jacobian.to(self.rows.dtype) / self.prior_precision
        removed = torch.linalg.solve_triangular(self.cholesky, self.rows @ scaled.reshape(m * c, p).T, upper=False)
        return scaled, removed.reshape(-1, m, c).permute(1, 0, 2)

    def log_det(self) -> Tensor:
        log_det: Tensor = self.prior_precision.log().sum() + 2 * self.cholesky.diagonal().log().sum()
        return log_det


def bytes_needed(n_rows: int, n_parameters: int, element_size: int) -> int:
    """The rows (kept, joined and scaled once), the inner matrix and its factor."""
    return (3 * n_rows * n_parameters + 3 * n_rows**2) * element_size
