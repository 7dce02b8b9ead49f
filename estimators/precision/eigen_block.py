"""One layer's block of a structured precision: diagonal in a Kronecker basis, or in that of the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.layer_rows import RowFactors
from estimators.memory import rows_per_chunk

__all__ = ["EigenBlock"]


@dataclass(frozen=True)
class EigenBlock:
    """A = (U ⊗ V) diag(λ) (U ⊗ V)ᵀ over a weight (O, E): λ (O, E) > 0, U (O, O) and V (E, E), or None for the identity.

    A row's Jacobian is J = Σ_t b_t a_tᵀ; in the basis, J̃ = Uᵀ J V = Σ_t (Uᵀb_t)(Vᵀa_t)ᵀ, and J A⁻¹ Jᵀ = Σ J̃²/λ. With
    one place t, J̃² is an outer product and is never made.
    """

    eigenvalues: Tensor
    output_basis: Tensor | None = None
    input_basis: Tensor | None = None

    def rotated(self, rows: RowFactors) -> RowFactors:
        """The factors in the basis."""
        inputs = rows.inputs if self.input_basis is None else rows.inputs @ self.input_basis
        slopes = rows.slopes if self.output_basis is None else rows.slopes @ self.output_basis
        return RowFactors(inputs, slopes)

    def variance(self, rows: RowFactors) -> Tensor:
        """(M, K)."""
        rotated = self.rotated(rows)
        if rotated.inputs.shape[1] == 1:
            along = rotated.inputs[:, 0].square() @ self.eigenvalues.reciprocal().T  # Σ_e ã_e²/λ_oe, (M, O)
            variance: Tensor = (rotated.slopes[:, :, 0].square() @ along[:, :, None])[..., 0]
            return variance
        weights = self.eigenvalues.reciprocal()
        return by_rows(rotated, lambda jacobian: (jacobian.square() * weights).sum((2, 3)))

    def covariance(self, rows: RowFactors) -> Tensor:
        """(M, K, K)."""
        rotated = self.rotated(rows)
        if rotated.inputs.shape[1] == 1:
            slopes = rotated.slopes[:, :, 0]
            along = rotated.inputs[:, 0].square() @ self.eigenvalues.reciprocal().T
            covariance: Tensor = (slopes * along[:, None]) @ slopes.transpose(1, 2)
            return covariance

        def gram(jacobian: Tensor) -> Tensor:
            white = (jacobian * self.eigenvalues.rsqrt()).flatten(2)
            return white @ white.transpose(1, 2)

        return by_rows(rotated, gram)

    def solve(self, matrices: Tensor) -> Tensor:
        """A⁻¹ of matrices (n, O, E)."""
        return self._back(self._into(matrices) / self.eigenvalues)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """(n, O, E) ~ N(0, A⁻¹)."""
        e = self.eigenvalues
        z = torch.randn(n_samples, *e.shape, generator=generator, dtype=e.dtype, device=e.device)
        return self._back(z / e.sqrt())

    def _into(self, matrices: Tensor) -> Tensor:
        left = matrices if self.output_basis is None else self.output_basis.T @ matrices
        return left if self.input_basis is None else left @ self.input_basis

    def _back(self, matrices: Tensor) -> Tensor:
        left = matrices if self.output_basis is None else self.output_basis @ matrices
        return left if self.input_basis is None else left @ self.input_basis.T


def by_rows(rows: RowFactors, read: Callable[[Tensor], Tensor]) -> Tensor:
    """`read` of the Jacobians J (m, K, O, E), made for as many rows at a time as fit."""
    _, k, _, o = rows.slopes.shape
    e, element = rows.inputs.shape[-1], rows.inputs.element_size()
    pieces = []
    for part in torch.arange(len(rows.inputs)).split(rows_per_chunk(2 * k * o * e * element)):
        jacobian = rows.slopes[part].transpose(2, 3) @ rows.inputs[part, None]  # Σ_t b_t a_tᵀ
        pieces.append(read(jacobian))
    return torch.cat(pieces)
