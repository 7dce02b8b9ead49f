"""A as a dense matrix with a Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.errors import IndefiniteHessianError
from estimators.numerics.dtype import WELL_CONDITIONED

__all__ = ["DensePrecision", "bytes_needed", "smallest_allowed_ratio"]


class DensePrecision(Precision):
    """A = L Lᵀ; covariance = (L⁻¹Jᵀ)ᵀ(L⁻¹Jᵀ), one triangular solve a query, in the dtype of A.

    `smallest` is a number that no eigenvalue of A is below, where one is known. Queries in float32 are solved in
    float32 where it shows that A is conditioned well enough: seen then at most 8e-7 from the variance in float64.

    Errors: IndefiniteHessianError where A is not positive definite; with `check_condition` (for exact Hessians, which
    may be singular by a symmetry, and where a prior precision is 0) also where its smallest eigenvalue is below
    `smallest_allowed_ratio` × the largest.
    """

    def __init__(self, matrix: Tensor, *, check_condition: bool = False, smallest: float = 0.0) -> None:
        if check_condition:
            _refuse_near_singular(matrix)
        self.cholesky = _factor(matrix)
        self._narrows = float(matrix.norm()) <= WELL_CONDITIONED * smallest  # ‖A‖_F ≥ its largest eigenvalue
        self._narrow: Tensor | None = None

    @classmethod
    def factored(cls, cholesky: Tensor) -> DensePrecision:
        """From a factor L (P, P) that was kept."""
        precision = cls.__new__(cls)
        precision.cholesky = cholesky
        precision._narrows, precision._narrow = False, None
        return precision

    def solve(self, vectors: Tensor) -> Tensor:
        return torch.cholesky_solve(vectors.T.to(self.cholesky.dtype), self.cholesky).T.to(vectors.dtype)

    def whiten(self, jacobian: Tensor) -> Tensor:
        """(L⁻¹ Jᵀ) of jacobian (M, C, P), as (M, P, C)."""
        m, c, p = jacobian.shape
        factor = self._factor_for(jacobian.dtype)
        columns = jacobian.reshape(m * c, p).T.to(factor.dtype)
        white: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
        return white.reshape(p, m, c).permute(1, 0, 2)

    def _factor_for(self, dtype: torch.dtype) -> Tensor:
        """L to solve with at queries of a dtype."""
        if not self._narrows or dtype != torch.float32:
            return self.cholesky
        if self._narrow is None:
            self._narrow = self.cholesky.to(dtype)
        return self._narrow

    def covariance(self, jacobian: Tensor) -> Tensor:
        white = self.whiten(jacobian)
        return (white.transpose(1, 2) @ white).to(jacobian.dtype)

    def variance(self, jacobian: Tensor) -> Tensor:
        return self.whiten(jacobian).square().sum(1).to(jacobian.dtype)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """L⁻ᵀ z ~ N(0, A⁻¹), (n_samples, P), in the dtype of A."""
        p, factor = len(self.cholesky), self.cholesky
        z = torch.randn(p, n_samples, generator=generator, dtype=factor.dtype, device=factor.device)
        draws: Tensor = torch.linalg.solve_triangular(factor.T, z, upper=True).T
        return draws

    def log_det(self) -> Tensor:
        return 2 * self.cholesky.diagonal().log().sum()


def _factor(matrix: Tensor) -> Tensor:
    """L; a matrix that only round-off makes indefinite in float32 is factored in float64."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    if matrix.dtype == torch.float64:
        raise _indefinite(matrix)
    return _factor(matrix.double()).to(matrix.dtype)


def _refuse_near_singular(matrix: Tensor) -> None:
    """A − τ·λmax·I has a Cholesky factor exactly where the smallest eigenvalue exceeds τ·λmax."""
    shift = smallest_allowed_ratio(matrix.dtype) * float(torch.linalg.matrix_norm(matrix, ord=1))
    shifted = matrix.clone()
    shifted.diagonal().sub_(shift)
    if int(torch.linalg.cholesky_ex(shifted).info) != 0:
        raise _indefinite(matrix)


def _indefinite(matrix: Tensor) -> IndefiniteHessianError:
    eigenvalues = torch.linalg.eigvalsh(matrix)
    return IndefiniteHessianError(smallest=float(eigenvalues[0]), largest=float(eigenvalues[-1]))


def smallest_allowed_ratio(dtype: torch.dtype) -> float:
    """Smallest over largest eigenvalue at which a Hessian counts as invertible: 5e-10 in float64, 2e-6 in float32."""
    return 5e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps


def bytes_needed(n_parameters: int, element_size: int) -> int:
    """The matrix, its factor and the workspace of the factorisation."""
    return 3 * n_parameters**2 * element_size
