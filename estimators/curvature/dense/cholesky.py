"""A posterior precision as a dense matrix with a Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.curvature.base import Precision, standard_normal
from estimators.curvature.definiteness import smallest_allowed_ratio
from estimators.errors import IndefiniteHessianError
from estimators.numerics.dtype import WELL_CONDITIONED

__all__ = ["DensePrecision", "bytes_needed"]


class DensePrecision(Precision):
    """A = L Lᵀ with covariance (L⁻¹Jᵀ)ᵀ(L⁻¹Jᵀ): one triangular solve per query, in the dtype of A.

    Args:
        matrix: A (P, P).
        check_condition: whether to compare the smallest eigenvalue with `smallest_allowed_ratio` × the largest. Exact
            Hessians may be singular by a symmetry, and so is a GGN if a prior precision is 0.
        smallest: a lower bound of the eigenvalues of A, 0 if none is known. Queries in float32 are solved in float32
            if it shows that A is conditioned well enough; their variances were within 8e-7 of those in float64.

    Attributes:
        cholesky: L (P, P).
        allows_float32: whether it does.

    Raises:
        IndefiniteHessianError: A is not positive definite, or fails `check_condition`.
    """

    def __init__(self, matrix: Tensor, *, check_condition: bool = False, smallest: float = 0.0) -> None:
        if check_condition:
            _check_condition(matrix)
        self.cholesky = _factor(matrix)
        self.allows_float32 = float(matrix.norm()) <= WELL_CONDITIONED * smallest  # ‖A‖_F ≥ its largest eigenvalue
        self._float32: Tensor | None = None

    @classmethod
    def factored(cls, cholesky: Tensor, *, allows_float32: bool = False) -> DensePrecision:
        """A from its Cholesky factor L (P, P)."""
        precision = cls.__new__(cls)
        precision.cholesky = cholesky
        precision.allows_float32, precision._float32 = allows_float32, None
        return precision

    def solve(self, vectors: Tensor) -> Tensor:
        return torch.cholesky_solve(vectors.T.to(self.cholesky.dtype), self.cholesky).T.to(vectors.dtype)

    def multiply(self, vectors: Tensor) -> Tensor:
        product: Tensor = vectors.to(self.cholesky.dtype) @ self.cholesky @ self.cholesky.T
        return product.to(vectors.dtype)

    def marginal_variance(self, theta: Tensor) -> Tensor:
        return torch.cholesky_inverse(self.cholesky).diagonal().to(theta.dtype)

    def whiten(self, jacobian: Tensor) -> Tensor:
        """L⁻¹ Jᵀ (M, P, C) for a Jacobian J (M, C, P)."""
        m, c, p = jacobian.shape
        factor = self._factor_for(jacobian.dtype)
        columns = jacobian.reshape(m * c, p).T.to(factor.dtype)
        white: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
        return white.reshape(p, m, c).permute(1, 0, 2)

    def _factor_for(self, dtype: torch.dtype) -> Tensor:
        """L in the dtype in which queries of `dtype` are solved."""
        if not self.allows_float32 or dtype != torch.float32:
            return self.cholesky
        if self._float32 is None:
            self._float32 = self.cholesky.to(dtype)
        return self._float32

    def covariance(self, jacobian: Tensor) -> Tensor:
        white = self.whiten(jacobian)
        return (white.transpose(1, 2) @ white).to(jacobian.dtype)

    def variance(self, jacobian: Tensor) -> Tensor:
        return self.whiten(jacobian).square().sum(1).to(jacobian.dtype)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """L⁻ᵀ z ~ N(0, A⁻¹), (n_samples, P), in the dtype of A."""
        p, factor = len(self.cholesky), self.cholesky
        samples: Tensor = torch.linalg.solve_triangular(
            factor.T, standard_normal((p, n_samples), factor, generator), upper=True
        ).T
        return samples

    def log_det(self) -> Tensor:
        return 2 * self.cholesky.diagonal().log().sum()


def _factor(matrix: Tensor) -> Tensor:
    """L; computed in float64 if round-off makes the matrix indefinite in float32."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    if matrix.dtype == torch.float64:
        raise _indefinite(matrix)
    return _factor(matrix.double()).to(matrix.dtype)


def _check_condition(matrix: Tensor) -> None:
    """Check that the smallest eigenvalue exceeds τ·λmax: exactly then A − τ·λmax·I has a Cholesky factor."""
    shift = smallest_allowed_ratio(matrix.dtype) * float(torch.linalg.matrix_norm(matrix, ord=1))
    shifted = matrix.clone()
    shifted.diagonal().sub_(shift)
    if int(torch.linalg.cholesky_ex(shifted).info) != 0:
        raise _indefinite(matrix)


def _indefinite(matrix: Tensor) -> IndefiniteHessianError:
    """The error for an indefinite matrix, with its extreme eigenvalues."""
    eigenvalues = torch.linalg.eigvalsh(matrix)
    return IndefiniteHessianError(smallest=float(eigenvalues[0]), largest=float(eigenvalues[-1]))


def bytes_needed(n_parameters: int, element_size: int) -> int:
    """Memory in bytes of the matrix, its factor and the workspace of the factorisation."""
    return 3 * n_parameters**2 * element_size
