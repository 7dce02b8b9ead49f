"""The block of one layer in a structured precision: diagonal in a Kronecker basis, or in the basis of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from estimators.curvature.base import standard_normal
from estimators.models.jacobian_factors import JacobianFactors
from estimators.numerics.dtype import WELL_CONDITIONED
from estimators.runtime.memory import rows_per_chunk

__all__ = ["KroneckerBlock", "by_rows"]

_CACHE = 2**22
"""Bytes of the Jacobians of one chunk of rows, 4 MiB: larger chunks leave the cache, and take longer."""
_WELL_CONDITIONED_OUTSIDE = 1e4
"""`WELL_CONDITIONED` for inputs outside the basis: |a|² minus its part inside is a difference."""


@dataclass(frozen=True)
class KroneckerBlock:
    """A = (U ⊗ V) diag(λ) (U ⊗ V)ᵀ over a weight (O, E).

    The Jacobian of a row is J = Σ_t b_t a_tᵀ. In the basis, J̃ = Uᵀ J V = Σ_t (Uᵀb_t)(Vᵀa_t)ᵀ, and J A⁻¹ Jᵀ = Σ J̃²/λ.
    With one position t, J̃² is an outer product and is never made.

    Eigenvalues and bases are in `algebra_dtype`. Rows in float32 are computed with in float32 if the block is
    conditioned well enough, and converted otherwise. Results have the dtype of the computation.

    Attributes:
        eigenvalues: λ (q, r) > 0.
        output_basis: U (O, q); None for the identity.
        input_basis: V (E, r); None for the identity.
        outside: the eigenvalue of A, a scalar, outside the span of U ⊗ V; None if q = O and r = E.
    """

    eigenvalues: Tensor
    output_basis: Tensor | None = None
    input_basis: Tensor | None = None
    outside: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (O, E) of the weight."""
        bases = (self.output_basis, self.input_basis)
        o, e = (n if basis is None else len(basis) for n, basis in zip(self.eigenvalues.shape, bases, strict=True))
        return o, e

    @property
    def n_outside(self) -> int:
        """The number of dimensions outside the span of U ⊗ V: O·E − q·r."""
        return math.prod(self.shape) - self.eigenvalues.numel()

    def rotated(self, rows: JacobianFactors) -> JacobianFactors:
        """The factors of rows in the basis."""
        inputs = rows.inputs if self.input_basis is None else rows.inputs @ self.input_basis
        gradients = rows.gradients if self.output_basis is None else rows.gradients @ self.output_basis
        return JacobianFactors(inputs, gradients)

    def jacobians(self, rows: JacobianFactors) -> Tensor:
        """J̃ (M, K, q, r): each basis is applied to the factors or to their product, whichever is less work."""
        _, k, t, o = rows.gradients.shape
        u, v = self.output_basis, self.input_basis
        u_first, v_first = t <= rows.inputs.shape[-1], t <= k * o
        on_factors = replace(self, output_basis=u if u_first else None, input_basis=v if v_first else None)
        product = on_factors.rotated(rows).jacobians()
        product = product if v is None or v_first else product @ v
        return product if u is None or u_first else u.T @ product

    def variance(self, rows: JacobianFactors) -> Tensor:
        """The diagonal (M, K) of J A⁻¹ Jᵀ at M rows with K cotangents."""
        if rows.inputs.dtype != self.eigenvalues.dtype:
            if self._allows_float32:
                return self._float32.variance(rows)
            return self.variance(rows.to(self.eigenvalues.dtype))
        if rows.inputs.shape[1] == 1:
            rotated = self.rotated(rows)
            by_output = self._variance_by_output(rows, rotated)
            variance: Tensor = (rotated.gradients[:, :, 0].square() @ by_output[:, :, None])[..., 0]
            outside = self._outside_outputs(rows)
            if outside is None or self.outside is None:
                return variance
            return variance + (rows.inputs.square().sum((1, 2))[:, None] * outside.square().sum((2, 3))) / self.outside
        weights = self.eigenvalues.reciprocal().flatten()
        variance = by_rows(rows, lambda part: self.jacobians(part).square_().flatten(2) @ weights)
        if self.outside is None:
            return variance
        of_inputs, inside = self._grams(rows)
        gradients = rows.gradients
        squares = ((of_inputs[:, None] @ gradients) * gradients).sum((2, 3))
        outside = self._outside_outputs(rows)
        if outside is not None:
            squares = squares + ((inside[:, None] @ outside) * outside).sum((2, 3))
        return variance + squares / self.outside

    def covariance(self, rows: JacobianFactors) -> Tensor:
        """J A⁻¹ Jᵀ (M, K, K) at M rows with K cotangents."""
        if rows.inputs.dtype != self.eigenvalues.dtype:
            if self._allows_float32:
                return self._float32.covariance(rows)
            return self.covariance(rows.to(self.eigenvalues.dtype))
        if rows.inputs.shape[1] == 1:
            rotated = self.rotated(rows)
            gradients = rotated.gradients[:, :, 0]
            weighted = gradients * self._variance_by_output(rows, rotated)[:, None]
            covariance: Tensor = weighted @ gradients.transpose(1, 2)
            outputs = self._outside_outputs(rows)
            if outputs is None or self.outside is None:
                return covariance
            outputs, lengths = outputs[:, :, 0], rows.inputs.square().sum((1, 2))
            return covariance + lengths[:, None, None] * (outputs @ outputs.transpose(1, 2)) / self.outside
        weights = self.eigenvalues.rsqrt()

        def gram(part: JacobianFactors) -> Tensor:
            white = self.jacobians(part).mul_(weights).flatten(2)
            return white @ white.transpose(1, 2)

        covariance = by_rows(rows, gram)
        if self.outside is None:
            return covariance
        of_inputs, inside = self._grams(rows)
        products = (of_inputs[:, None] @ rows.gradients).flatten(2) @ rows.gradients.flatten(2).transpose(1, 2)
        outputs = self._outside_outputs(rows)
        if outputs is not None:
            products = products + (inside[:, None] @ outputs).flatten(2) @ outputs.flatten(2).transpose(1, 2)
        return covariance + products / self.outside

    def whitened(self, rows: JacobianFactors) -> Tensor:
        """J A^(−½) (M, K, n) at M rows with K cotangents, up to a rotation."""
        rows = rows.to(self.eigenvalues.dtype)
        inside = (self.jacobians(rows) * self.eigenvalues.rsqrt()).flatten(2)
        if self.outside is None:
            return inside
        outside = self._outside_part(rows.jacobians()) * self.outside.rsqrt()
        return torch.cat([inside, outside.flatten(2)], dim=-1)

    def has_joint_form(self, rows: JacobianFactors) -> bool:
        """Whether `joint_covariance` works on the factors: one position, and no part outside the span of U ⊗ V."""
        return rows.inputs.shape[1] == 1 and self.outside is None

    def joint_covariance(self, rows: JacobianFactors) -> Tensor:
        """J A⁻¹ Jᵀ (M, K, M, K) between M rows with one position and K cotangents each.

        J̃ is an outer product b aᵀ there, so that rows m and n have Σ_q b_mq b_nq Σ_r a_mr a_nr / λ_qr: no row of J
        is made, which has O·E numbers for each of M·K.
        """
        rotated = self.rotated(rows.to(self.eigenvalues.dtype))
        inputs, gradients = rotated.inputs[:, 0], rotated.gradients[:, :, 0]  # a (M, r), b (M, K, q)
        (m, k, _), weights = gradients.shape, self.eigenvalues.reciprocal().T
        covariance = gradients.new_empty(m, k, m, k)
        for i in range(m):
            by_output = (inputs * inputs[i]) @ weights  # (M, q)
            weighted = (gradients * by_output[:, None]).flatten(0, 1)  # (M·K, q)
            covariance[i] = (gradients[i] @ weighted.T).unflatten(1, (m, k))
        return covariance

    @cached_property
    def _allows_float32(self) -> bool:
        """Whether rows in float32 may be computed with in float32."""
        smallest, largest = (float(end) for end in self.eigenvalues.aminmax())
        if self.outside is None:
            return largest <= WELL_CONDITIONED * smallest
        return largest <= _WELL_CONDITIONED_OUTSIDE * min(smallest, float(self.outside))

    @cached_property
    def _float32(self) -> KroneckerBlock:
        """The block in float32."""
        parts = (self.eigenvalues, self.output_basis, self.input_basis, self.outside)
        return KroneckerBlock(*(None if part is None else part.float() for part in parts))  # type: ignore[arg-type]

    def _variance_by_output(self, rows: JacobianFactors, rotated: JacobianFactors) -> Tensor:
        """aᵀ (block of output eigenvector u)⁻¹ a (M, q), for rows with one position."""
        inside = rotated.inputs[:, 0].square()
        variance: Tensor = inside @ self.eigenvalues.reciprocal().T
        if self.outside is None:
            return variance
        return variance + ((rows.inputs[:, 0].square().sum(1) - inside.sum(1)).clamp_min(0) / self.outside)[:, None]

    def _grams(self, rows: JacobianFactors) -> tuple[Tensor, Tensor]:
        """Inner products (M, T, T) between positions, of the parts of the inputs outside and inside the span of V."""
        rotated = rows.inputs if self.input_basis is None else rows.inputs @ self.input_basis
        inside: Tensor = rotated @ rotated.transpose(1, 2)
        return rows.inputs @ rows.inputs.transpose(1, 2) - inside, inside

    def _outside_outputs(self, rows: JacobianFactors) -> Tensor | None:
        """The part of the gradients (M, K, T, O) outside the span of U; None if q = O."""
        basis = self.output_basis
        if basis is None or basis.shape[0] == basis.shape[1]:
            return None
        return rows.gradients - (rows.gradients @ basis) @ basis.T

    def solve(self, matrices: Tensor) -> Tensor:
        """A⁻¹ applied to matrices (n, O, E)."""
        matrices = matrices.to(self.eigenvalues.dtype)
        solved = self._from_basis(self._to_basis(matrices) / self.eigenvalues)
        return solved if self.outside is None else solved + self._outside_part(matrices) / self.outside

    @property
    def inverse(self) -> KroneckerBlock:
        """The block of A⁻¹."""
        outside = None if self.outside is None else self.outside.reciprocal()
        return replace(self, eigenvalues=self.eigenvalues.reciprocal(), outside=outside)

    def marginal_variance(self) -> Tensor:
        """The diagonal of A⁻¹, (O, E): Σ_or U_io² V_jr² / λ_or, and what lies outside the span of U ⊗ V."""
        variance = self._by_squares(self.eigenvalues.reciprocal())
        if self.outside is None:
            return variance
        return variance + (1 - self._by_squares(torch.ones_like(self.eigenvalues))).clamp_min(0) / self.outside

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Samples (n, O, E) ~ N(0, A⁻¹)."""
        values = self.eigenvalues
        inside = self._from_basis(standard_normal((n_samples, *values.shape), values, generator) / values.sqrt())
        if self.outside is None:
            return inside
        z = standard_normal((n_samples, *self.shape), values, generator)
        return inside + self._outside_part(z) / self.outside.sqrt()

    def log_det(self) -> Tensor:
        """log |A|, a scalar."""
        inside = self.eigenvalues.log().sum()
        return inside if self.outside is None else inside + self.n_outside * self.outside.log()

    def _by_squares(self, weights: Tensor) -> Tensor:
        """Σ_or U_io² V_jr² W_or (O, E) of W (q, r)."""
        u, v = self.output_basis, self.input_basis
        left = weights if u is None else u.square() @ weights
        return left if v is None else left @ v.square().T

    def _outside_part(self, matrices: Tensor) -> Tensor:
        """The part of matrices (n, O, E) outside the span of U ⊗ V."""
        return matrices - self._from_basis(self._to_basis(matrices))

    def _to_basis(self, matrices: Tensor) -> Tensor:
        """Uᵀ M V (n, q, r) of matrices M (n, O, E)."""
        left = matrices if self.output_basis is None else self.output_basis.T @ matrices
        return left if self.input_basis is None else left @ self.input_basis

    def _from_basis(self, matrices: Tensor) -> Tensor:
        """U M Vᵀ (n, O, E) of matrices M (n, q, r)."""
        left = matrices if self.output_basis is None else self.output_basis @ matrices
        return left if self.input_basis is None else left @ self.input_basis.T


def by_rows(rows: JacobianFactors, read: Callable[[JacobianFactors], Tensor]) -> Tensor:
    """Apply `read` to chunks of rows whose Jacobians (m, K, O, E) stay in the cache, and join the results."""
    _, k, _, o = rows.gradients.shape
    e, element = rows.inputs.shape[-1], rows.inputs.element_size()
    size = rows_per_chunk(k * o * e * element, budget=_CACHE)
    chunks = zip(rows.inputs.split(size), rows.gradients.split(size), strict=True)
    return torch.cat([read(JacobianFactors(*chunk)) for chunk in chunks])
