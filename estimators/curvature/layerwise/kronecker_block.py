"""One layer's block of a structured precision: diagonal in a Kronecker basis, or in that of the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from estimators.models.layer_jacobians import JacobianFactors
from estimators.numerics.dtype import WELL_CONDITIONED
from estimators.runtime.memory import rows_per_chunk

__all__ = ["KroneckerBlock", "by_rows"]

_CACHE = 2**22  # bytes
_WELL_CONDITIONED_OUTSIDE = 1e4
"""`WELL_CONDITIONED` where inputs lie outside the basis: their part, |a|² less that inside, is a difference."""


@dataclass(frozen=True)
class KroneckerBlock:
    """A = (U ⊗ V) diag(λ) (U ⊗ V)ᵀ over a weight (O, E): λ (O, r) > 0, U (O, O) and V (E, r), or None for the identity.

    Where V has fewer columns than rows, A is `outside`, a number, on the inputs that it leaves out. A row's Jacobian is
    J = Σ_t b_t a_tᵀ; in the basis, J̃ = Uᵀ J V = Σ_t (Uᵀb_t)(Vᵀa_t)ᵀ, and J A⁻¹ Jᵀ = Σ J̃²/λ. With one place t, J̃² is an
    outer product and is never made.

    Eigenvalues and bases are in `algebra_dtype`. Rows in float32 are read in float32 where the block is conditioned
    well enough, and widened elsewhere; results are of the dtype that they were computed in.
    """

    eigenvalues: Tensor
    output_basis: Tensor | None = None
    input_basis: Tensor | None = None
    outside: Tensor | None = None

    def rotated(self, rows: JacobianFactors) -> JacobianFactors:
        """The factors in the basis."""
        inputs = rows.inputs if self.input_basis is None else rows.inputs @ self.input_basis
        slopes = rows.slopes if self.output_basis is None else rows.slopes @ self.output_basis
        return JacobianFactors(inputs, slopes)

    def jacobians(self, rows: JacobianFactors) -> Tensor:
        """J̃ (M, K, O, r): each basis on the factors, or on their product, whichever is less work."""
        _, k, t, o = rows.slopes.shape
        u, v = self.output_basis, self.input_basis
        u_first, v_first = t <= rows.inputs.shape[-1], t <= k * o
        early = replace(self, output_basis=u if u_first else None, input_basis=v if v_first else None)
        product = early.rotated(rows).jacobians()
        product = product if v is None or v_first else product @ v
        return product if u is None or u_first else u.T @ product

    def variance(self, rows: JacobianFactors) -> Tensor:
        """(M, K)."""
        if rows.inputs.dtype != self.eigenvalues.dtype:
            return self._narrow.variance(rows) if self._narrows else self.variance(rows.to(self.eigenvalues.dtype))
        if rows.inputs.shape[1] == 1:
            rotated = self.rotated(rows)
            variance: Tensor = (rotated.slopes[:, :, 0].square() @ self._along(rows, rotated)[:, :, None])[..., 0]
            return variance
        weights = self.eigenvalues.reciprocal().flatten()
        variance = by_rows(rows, lambda part: self.jacobians(part).square_().flatten(2) @ weights)
        if self.outside is None:
            return variance
        slopes = rows.slopes
        return variance + ((self._unseen(rows)[:, None] @ slopes) * slopes).sum((2, 3)) / self.outside

    def covariance(self, rows: JacobianFactors) -> Tensor:
        """(M, K, K)."""
        if rows.inputs.dtype != self.eigenvalues.dtype:
            return self._narrow.covariance(rows) if self._narrows else self.covariance(rows.to(self.eigenvalues.dtype))
        if rows.inputs.shape[1] == 1:
            rotated = self.rotated(rows)
            slopes = rotated.slopes[:, :, 0]
            covariance: Tensor = (slopes * self._along(rows, rotated)[:, None]) @ slopes.transpose(1, 2)
            return covariance
        weights = self.eigenvalues.rsqrt()

        def gram(part: JacobianFactors) -> Tensor:
            white = self.jacobians(part).mul_(weights).flatten(2)
            return white @ white.transpose(1, 2)

        covariance = by_rows(rows, gram)
        if self.outside is None:
            return covariance
        seen = (self._unseen(rows)[:, None] @ rows.slopes).flatten(2)
        return covariance + seen @ rows.slopes.flatten(2).transpose(1, 2) / self.outside

    @cached_property
    def _narrows(self) -> bool:
        """Whether rows in float32 may be read in float32."""
        smallest, largest = (float(end) for end in self.eigenvalues.aminmax())
        if self.outside is None:
            return largest <= WELL_CONDITIONED * smallest
        return largest <= _WELL_CONDITIONED_OUTSIDE * min(smallest, float(self.outside))

    @cached_property
    def _narrow(self) -> KroneckerBlock:
        """The block in float32."""
        parts = (self.eigenvalues, self.output_basis, self.input_basis, self.outside)
        return KroneckerBlock(*(None if part is None else part.float() for part in parts))  # type: ignore[arg-type]

    def _along(self, rows: JacobianFactors, rotated: JacobianFactors) -> Tensor:
        """aᵀ (the block of output o)⁻¹ a of one place, (M, O)."""
        inside = rotated.inputs[:, 0].square()
        along: Tensor = inside @ self.eigenvalues.reciprocal().T
        if self.outside is None:
            return along
        return along + ((rows.inputs[:, 0].square().sum(1) - inside.sum(1)).clamp_min(0) / self.outside)[:, None]

    def _unseen(self, rows: JacobianFactors) -> Tensor:
        """Products between places of the inputs that V leaves out, (M, T, T)."""
        inside = self.rotated(rows).inputs
        unseen: Tensor = rows.inputs @ rows.inputs.transpose(1, 2) - inside @ inside.transpose(1, 2)
        return unseen

    def solve(self, matrices: Tensor) -> Tensor:
        """A⁻¹ of matrices (n, O, E)."""
        matrices = matrices.to(self.eigenvalues.dtype)
        solved = self._back(self._into(matrices) / self.eigenvalues)
        return solved if self.outside is None else solved + self._left_out(matrices) / self.outside

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """(n, O, E) ~ N(0, A⁻¹)."""

        def noise(*shape: int) -> Tensor:
            e = self.eigenvalues
            return torch.randn(n_samples, *shape, generator=generator, dtype=e.dtype, device=e.device)

        inside = self._back(noise(*self.eigenvalues.shape) / self.eigenvalues.sqrt())
        if self.outside is None or self.input_basis is None:
            return inside
        left_out = self._left_out(noise(len(self.eigenvalues), len(self.input_basis)))
        return inside + left_out / self.outside.sqrt()

    def log_det(self) -> Tensor:
        """log |A|."""
        inside = self.eigenvalues.log().sum()
        if self.outside is None or self.input_basis is None:
            return inside
        e, r = self.input_basis.shape
        return inside + len(self.eigenvalues) * (e - r) * self.outside.log()

    def _left_out(self, matrices: Tensor) -> Tensor:
        assert self.input_basis is not None
        return matrices - (matrices @ self.input_basis) @ self.input_basis.T

    def _into(self, matrices: Tensor) -> Tensor:
        left = matrices if self.output_basis is None else self.output_basis.T @ matrices
        return left if self.input_basis is None else left @ self.input_basis

    def _back(self, matrices: Tensor) -> Tensor:
        left = matrices if self.output_basis is None else self.output_basis @ matrices
        return left if self.input_basis is None else left @ self.input_basis.T


def by_rows(rows: JacobianFactors, read: Callable[[JacobianFactors], Tensor]) -> Tensor:
    """`read` of as many rows at a time as their Jacobians (m, K, O, E) stay in the cache."""
    _, k, _, o = rows.slopes.shape
    e, element = rows.inputs.shape[-1], rows.inputs.element_size()
    params = []
    for part in _slices(len(rows.inputs), rows_per_chunk(k * o * e * element, budget=_CACHE)):
        params.append(read(JacobianFactors(rows.inputs[part], rows.slopes[part])))
    return torch.cat(params)


def _slices(n: int, size: int) -> list[slice]:
    """Views, where an index would copy."""
    return [slice(start, start + size) for start in range(0, n, size)]
