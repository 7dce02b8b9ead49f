"""A = D + RᵀR in its dual (function-space) form: small if the N·C rows are fewer than the P parameters."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.numerics.symmetric import gram

__all__ = ["DualPrecision", "FunctionSpace", "bytes_needed"]


class FunctionSpace(Precision):
    """A = D + RᵀR by products with R, where D = diag δ > 0 and R (N·C, P) has the GGN rows SᵀJ.

        A⁻¹ = D⁻¹ − D⁻¹Rᵀ (I + R D⁻¹ Rᵀ)⁻¹ R D⁻¹          (Woodbury)
        log|A| = Σ log δ + log|I + R D⁻¹ Rᵀ|

    The formulas are derived in docs/math.md, section 2. Everything is computed in the dtype of `inner`.

    Args:
        prior_precision: δ (P,).
        inner: R D⁻¹ Rᵀ (N·C, N·C); it is overwritten.

    Attributes:
        keeps_rows: whether products with R need no pass over the data.
    """

    keeps_rows: ClassVar[bool] = True

    def __init__(self, prior_precision: Tensor, inner: Tensor) -> None:
        self.prior_precision = prior_precision.to(inner.dtype)
        inner.diagonal().add_(1.0)
        self.cholesky = torch.linalg.cholesky(inner)

    @abstractmethod
    def rows_times(self, vectors: Tensor) -> Tensor:
        """R v (K, N·C) for vectors v (K, P)."""

    @abstractmethod
    def transposed_times(self, coefficients: Tensor) -> Tensor:
        """Rᵀ w (K, P) for coefficients w (K, N·C)."""

    def solve(self, vectors: Tensor) -> Tensor:
        scaled = vectors.to(self.cholesky.dtype) / self.prior_precision  # D⁻¹ v
        projected = self.rows_times(scaled)  # R D⁻¹ v
        inner = torch.cholesky_solve(projected.T, self.cholesky).T  # (I + R D⁻¹ Rᵀ)⁻¹ R D⁻¹ v
        return (scaled - self.transposed_times(inner) / self.prior_precision).to(vectors.dtype)

    def multiply(self, vectors: Tensor) -> Tensor:
        wide = vectors.to(self.cholesky.dtype)
        return (wide * self.prior_precision + self.transposed_times(self.rows_times(wide))).to(vectors.dtype)

    def marginal_variance(self, theta: Tensor) -> Tensor:
        unit = torch.eye(len(self.cholesky), dtype=self.cholesky.dtype, device=self.cholesky.device)
        scaled = self.transposed_times(unit) / self.prior_precision  # R D⁻¹
        removed = torch.linalg.solve_triangular(self.cholesky, scaled, upper=False)
        variance: Tensor = 1 / self.prior_precision - removed.square().sum(0)
        return variance.to(theta.dtype)

    def covariance(self, jacobian: Tensor) -> Tensor:
        scaled, removed = self._prior_and_reduction(jacobian)
        prior = scaled @ jacobian.to(scaled.dtype).transpose(1, 2)
        return (prior - removed.transpose(1, 2) @ removed).to(jacobian.dtype)

    def variance(self, jacobian: Tensor) -> Tensor:
        scaled, removed = self._prior_and_reduction(jacobian)
        return ((scaled * jacobian.to(scaled.dtype)).sum(-1) - removed.square().sum(1)).to(jacobian.dtype)

    def _prior_and_reduction(self, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """J D⁻¹ (M, C, P), and L⁻¹ R D⁻¹ Jᵀ (M, N·C, C), by whose squares the data reduce the prior variance."""
        m, c, p = jacobian.shape
        scaled = jacobian.to(self.cholesky.dtype) / self.prior_precision
        projected = self.rows_times(scaled.reshape(m * c, p))
        removed = torch.linalg.solve_triangular(self.cholesky, projected.T, upper=False)
        return scaled, removed.reshape(-1, m, c).permute(1, 0, 2)

    def log_det(self) -> Tensor:
        log_det: Tensor = self.prior_precision.log().sum() + 2 * self.cholesky.diagonal().log().sum()
        return log_det


class DualPrecision(FunctionSpace):
    """A = D + RᵀR with the rows R (N·C, P) in memory; everything is computed in their dtype."""

    def __init__(self, prior_precision: Tensor, rows: Tensor) -> None:
        self.rows = rows
        super().__init__(prior_precision, gram(rows * prior_precision.to(rows.dtype).rsqrt()))  # R D⁻¹ Rᵀ

    def rows_times(self, vectors: Tensor) -> Tensor:
        return vectors @ self.rows.T

    def transposed_times(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.rows


def bytes_needed(n_rows: int, n_parameters: int, element_size: int) -> int:
    """Memory in bytes of the rows (stored, joined and scaled), the inner matrix, its factor and a temporary."""
    return (3 * n_rows * n_parameters + 3 * n_rows**2) * element_size
