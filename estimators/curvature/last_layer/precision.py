"""Precisions of a last linear layer f = Wφ + b in closed form on its features.

θ of the layer is the matrix (C, E), E = D + 1 with a bias: one row per output, the bias last. φ (M, E) has a 1
appended. Every f_c depends on row c alone, through φ. Therefore no Jacobian (M, C, C·E) is ever made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from estimators.curvature.base import standard_normal
from estimators.curvature.definiteness import check_eigenvalues
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.numerics.dtype import to_algebra_dtype
from estimators.runtime.memory import rows_per_chunk

__all__ = ["DiagLastLayer", "FullLastLayer", "KronLastLayer", "LastLayerPrecision"]


class LastLayerPrecision(ABC):
    """A over the entries (C, E) of a layer, and variances at features φ (M, E).

    A is in `algebra_dtype`, and features are converted to it: along an eigenvector of a small eigenvalue, features in
    float32 have round-off of their whole length. Variances have the dtype of the features, samples that of A.
    """

    @abstractmethod
    def variance(self, features: Tensor) -> Tensor:
        """The variance (M, C) of the outputs at features φ (M, E)."""

    @abstractmethod
    def covariance(self, features: Tensor) -> Tensor:
        """The covariance (M, C, C) of the outputs at features φ (M, E)."""

    @abstractmethod
    def joint_covariance(self, features: Tensor) -> Tensor:
        """The covariance (M, C, M, C) of the outputs at all features φ (M, E)."""

    @abstractmethod
    def solve(self, matrices: Tensor) -> Tensor:
        """A⁻¹ applied to matrices (K, C, E) of entries of the layer, in the dtype of A."""

    @abstractmethod
    def multiply(self, matrices: Tensor) -> Tensor:
        """A applied to matrices (K, C, E) of entries of the layer, in the dtype of A."""

    @abstractmethod
    def marginal_variance(self) -> Tensor:
        """The diagonal (C, E) of A⁻¹."""

    @abstractmethod
    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Displacements (n_samples, C, E) of the layer ~ N(0, A⁻¹)."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """log |A|, a scalar."""


class FullLastLayer(LastLayerPrecision):
    """A = Σₙ Λₙ ⊗ φₙφₙᵀ + diag δ, from the sum (C, E, C, E) and δ (C, E), in the dtype of the sum."""

    def __init__(self, curvature: Tensor, prior_precision: Tensor) -> None:
        n = prior_precision.numel()
        matrix = curvature.reshape(n, n) + prior_precision.reshape(n).to(curvature.dtype).diag()
        dense = DensePrecision(matrix, check_condition=not bool((prior_precision > 0).all()))
        self._set_factor(dense, prior_precision.shape)

    @classmethod
    def factored(cls, cholesky: Tensor, shape: tuple[int, int]) -> FullLastLayer:
        """A from its Cholesky factor (C·E, C·E) and the shape (C, E) of the layer."""
        precision = cls.__new__(cls)
        precision._set_factor(DensePrecision.factored(cholesky), shape)
        return precision

    def _set_factor(self, dense: DensePrecision, shape: tuple[int, ...]) -> None:
        """Store the factor, and the blocks of A⁻¹ that variances need."""
        self.dense, self.shape = dense, shape
        self.inverse = torch.cholesky_inverse(self.dense.cholesky).reshape(*self.shape, *self.shape)
        self.diagonal_blocks = self.inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def variance(self, features: Tensor) -> Tensor:
        wide = features.to(self.inverse.dtype)
        return torch.einsum("cme,me->mc", wide @ self.diagonal_blocks, wide).to(features.dtype)

    def covariance(self, features: Tensor) -> Tensor:
        c, e = self.shape
        parts = []
        wide = features.to(self.inverse.dtype)
        for part in wide.split(rows_per_chunk(2 * c * c * e * wide.element_size())):
            left = (part @ self.inverse.permute(1, 0, 2, 3).reshape(e, -1)).reshape(-1, c, c, e)  # φᵀA⁻¹
            parts.append(torch.einsum("mcke,me->mck", left, part))
        return torch.cat(parts).to(features.dtype)

    def joint_covariance(self, features: Tensor) -> Tensor:
        wide = features.to(self.inverse.dtype)
        return torch.einsum("me,cekd,nd->mcnk", wide, self.inverse, wide).to(features.dtype)

    def solve(self, matrices: Tensor) -> Tensor:
        return self.dense.solve(matrices.to(self.inverse.dtype).flatten(1)).view_as(matrices)

    def multiply(self, matrices: Tensor) -> Tensor:
        return self.dense.multiply(matrices.to(self.inverse.dtype).flatten(1)).view_as(matrices)

    def marginal_variance(self) -> Tensor:
        return self.diagonal_blocks.diagonal(dim1=1, dim2=2)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        return self.dense.sample(n_samples, generator).reshape(n_samples, *self.shape)

    def log_det(self) -> Tensor:
        return self.dense.log_det()


class KronLastLayer(LastLayerPrecision):
    """A = Λ̄ ⊗ Q + δ I, Q = Σ φφᵀ (E, E), Λ̄ = mean Λ (C, C): δ is exact, in the eigenbasis (Immer et al. 2021)."""

    def __init__(self, mean_hessian: Tensor, features_gram: Tensor, prior_precision: float) -> None:
        values, self.output_basis = torch.linalg.eigh(to_algebra_dtype(mean_hessian))
        moments, self.feature_basis = torch.linalg.eigh(to_algebra_dtype(features_gram))
        self.eigenvalues = torch.outer(values.clamp_min(0), moments.clamp_min(0)) + prior_precision
        if prior_precision == 0:
            check_eigenvalues(self.eigenvalues)

    def _spectrum(self, features: Tensor) -> Tensor:
        """Variance along each output eigenvector, (M, C): Σ_e (Vᵀφ)²_e / (l_c q_e + δ)."""
        spectrum: Tensor = (to_algebra_dtype(features) @ self.feature_basis).square() @ self.eigenvalues.reciprocal().T
        return spectrum

    def variance(self, features: Tensor) -> Tensor:
        variance: Tensor = self._spectrum(features) @ self.output_basis.square().T
        return variance.to(features.dtype)

    def covariance(self, features: Tensor) -> Tensor:
        spectrum, basis = self._spectrum(features), self.output_basis
        m, c = spectrum.shape
        covariance = spectrum.new_empty(m, c, c)
        for part in torch.arange(m).split(rows_per_chunk(2 * c * c * spectrum.element_size(), budget=2**26)):
            torch.matmul(basis * spectrum[part, None, :], basis.T, out=covariance[part[0] : part[-1] + 1])
        return covariance.to(features.dtype)

    def joint_covariance(self, features: Tensor) -> Tensor:
        rotated = to_algebra_dtype(features) @ self.feature_basis  # Vᵀφ
        spectrum = torch.einsum("me,ne,ce->mnc", rotated, rotated, self.eigenvalues.reciprocal())
        covariance = torch.einsum("mno,co,ko->mcnk", spectrum, self.output_basis, self.output_basis)
        return covariance.to(features.dtype)

    def solve(self, matrices: Tensor) -> Tensor:
        return self._scaled(matrices, self.eigenvalues.reciprocal())

    def multiply(self, matrices: Tensor) -> Tensor:
        return self._scaled(matrices, self.eigenvalues)

    def _scaled(self, matrices: Tensor, factors: Tensor) -> Tensor:
        """Matrices (K, C, E), multiplied by factors (C, E) in the eigenbasis."""
        rotated = self.output_basis.T @ to_algebra_dtype(matrices) @ self.feature_basis
        scaled: Tensor = self.output_basis @ (rotated * factors) @ self.feature_basis.T
        return scaled

    def marginal_variance(self) -> Tensor:
        variance: Tensor = self.output_basis.square() @ self.eigenvalues.reciprocal() @ self.feature_basis.square().T
        return variance

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        z = standard_normal((n_samples, *self.eigenvalues.shape), self.eigenvalues, generator)
        samples: Tensor = self.output_basis @ (z / self.eigenvalues.sqrt()) @ self.feature_basis.T
        return samples

    def log_det(self) -> Tensor:
        return self.eigenvalues.log().sum()


class DiagLastLayer(LastLayerPrecision):
    """A = diag(Σₙ Λₙ,cc φₙₑ²) + diag δ, both (C, E)."""

    def __init__(self, diagonal: Tensor, prior_precision: Tensor) -> None:
        self.diagonal = to_algebra_dtype(diagonal) + prior_precision
        if not bool((prior_precision > 0).all()):
            check_eigenvalues(self.diagonal)

    def variance(self, features: Tensor) -> Tensor:
        return (to_algebra_dtype(features).square() @ self.diagonal.reciprocal().T).to(features.dtype)

    def covariance(self, features: Tensor) -> Tensor:
        return self.variance(features).diag_embed()

    def joint_covariance(self, features: Tensor) -> Tensor:
        wide = to_algebra_dtype(features)
        by_output = torch.einsum("me,ne,ce->mnc", wide, wide, self.diagonal.reciprocal())
        return by_output.diag_embed().transpose(1, 2).to(features.dtype)

    def solve(self, matrices: Tensor) -> Tensor:
        return to_algebra_dtype(matrices) / self.diagonal

    def multiply(self, matrices: Tensor) -> Tensor:
        return to_algebra_dtype(matrices) * self.diagonal

    def marginal_variance(self) -> Tensor:
        return self.diagonal.reciprocal()

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        return standard_normal((n_samples, *self.diagonal.shape), self.diagonal, generator) / self.diagonal.sqrt()

    def log_det(self) -> Tensor:
        return self.diagonal.log().sum()
