"""Bounds of the variance at any x, from the Krylov space of a solve and the last-layer block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.numerics.reductions import dots, inner
from estimators.regvar.rao_blackwell import RaoBlackwellBlock
from estimators.runtime.memory import rows_per_chunk

__all__ = ["VarianceBounds"]


_ROUND_OFF = 64 * torch.finfo(torch.float64).eps
"""Error of an eigenvalue of S in units of the largest: S is formed in float64, as a difference of long sums."""


@dataclass(frozen=True)
class VarianceBounds:
    """Matrices lower(x) ≤ J A⁻¹ Jᵀ ≤ upper(x); both converge to it as the Krylov space grows (docs/math.md, section 5).

    lower: Galerkin projection on the space and the last layer L together, so never below the last-layer covariance:

        Σ_L + (J Z) S⁻¹ (J Z)ᵀ,   Z = W − A_LL⁻¹ A_LW,   S = T − A_WL A_LL⁻¹ A_LW

    upper: J (G₀ + δ)⁻¹ Jᵀ, with G₀ ⪯ G the data's curvature as far as the space has seen it: the prior covariance
    less a matrix of low rank.

    Args:
        network: the network at θ̂.
        space: Krylov space W, rank r, and T = Wᵀ A W.
        block: the last-layer block L, or None.
        whitener: matrix with whitenerᵀ whitener = S⁻¹, (q, r).
        along_block: A_LL⁻¹ A_LW, (r, C, E), or None.
    """

    network: Network
    space: KrylovSpace
    block: RaoBlackwellBlock | None
    whitener: Tensor
    along_block: Tensor | None

    @classmethod
    def of(cls, network: Network, space: KrylovSpace, block: RaoBlackwellBlock | None) -> VarianceBounds:
        """Return the bounds of a Krylov space, with S and A_LL⁻¹ A_LW computed."""
        schur, along = space.galerkin, None
        if block is not None:
            scale = block.last_layer.to_matrix(space.scale).square()
            image = torch.tensordot(space.expansion, (block.last_layer.to_matrix(space.basis) / scale).double(), dims=1)
            along = block.precision.dense.solve(image.flatten(1)).view_as(image)
            schur = schur - image.flatten(1) @ along.flatten(1).T
        return cls(network, space, block, _whitener(0.5 * (schur + schur.T), space.scale.dtype), along)

    def variance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """Return lower and upper bound of the variance, (M, C) each."""
        return self._in_chunks(self._variance, x)

    def covariance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """Return lower and upper bound of the covariance, (M, C, C) each."""
        return self._in_chunks(self._covariance, x)

    def covariance_along(self, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower and upper bound of J A⁻¹ Jᵀ, (M, C, C) each, for J (M, C, P), differentiable in J."""
        wide = jacobian.to(self.whitener.dtype)
        response = torch.einsum("rp,mcp->rmc", self.space.basis.to(wide.dtype), wide)
        projected, removed = self._projections(response, lambda along, block: block.response_along(along, jacobian))
        lower = torch.einsum("rmc,rmd->mcd", projected, projected)
        if self.block is not None:
            lower = lower + self.block.covariance_along(wide)
        scaled = wide * self.space.scale.to(wide.dtype)
        upper = scaled @ scaled.transpose(1, 2) - torch.einsum("rmc,rmd->mcd", removed, removed)
        return lower.to(jacobian.dtype), upper.to(jacobian.dtype)

    def _variance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        jacobian = self.network.jacobian(x)
        projected, removed = self._responses(x, jacobian)
        lower, dtype = projected.square().sum(0), self.network.theta.dtype
        if self.block is not None:
            lower = lower + self.block.variance(x)
        rows = jacobian.flatten(0, 1)
        prior = dots(rows, rows, self.space.scale.square()).view_as(lower)  # Σ_p J_cp² / δ_p
        upper = prior - removed.square().sum(0)
        return lower.to(dtype), torch.maximum(upper, lower).to(dtype)

    def _covariance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        jacobian = self.network.jacobian(x)
        projected, removed = self._responses(x, jacobian)
        lower, dtype = torch.einsum("rmc,rmd->mcd", projected, projected), self.network.theta.dtype
        if self.block is not None:
            lower = lower + self.block.covariance(x)
        prior = torch.stack([inner(rows, rows) for rows in jacobian.mul_(self.space.scale)])
        upper = prior - torch.einsum("rmc,rmd->mcd", removed, removed)
        return lower.to(dtype), upper.to(dtype)

    def _responses(self, x: PyTree, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """Return S^(−½) Zᵀ Jᵀ and the factor of the low-rank term of the upper bound, (·, M, C) in float64."""
        response = inner(self.space.basis, jacobian.flatten(0, 1)).unflatten(1, jacobian.shape[:2])  # [W; Q] Jᵀ
        return self._projections(response, lambda along, block: block.response(along, x))

    def _projections(
        self, response: Tensor, of_block: Callable[[Tensor, RaoBlackwellBlock], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return `_responses` from [W; Q] Jᵀ, (·, M, C), and the responses J_L u along a layer L."""
        removed = torch.tensordot(self.space.reduction, response, dims=1)
        projected = response[: self.space.rank]
        if self.block is not None and self.along_block is not None:
            projected = projected - of_block(self.along_block, self.block)
        return torch.tensordot(self.whitener, projected, dims=1), removed

    def _in_chunks(self, bounds: Callable[[PyTree], tuple[Tensor, Tensor]], x: PyTree) -> tuple[Tensor, Tensor]:
        """Return `bounds` of x, computed for as many rows together as fit into memory with Jacobian and responses."""
        n_outputs = self.network.outputs(x).shape[-1]
        row_bytes = n_outputs * (2 * self.network.n_parameters + 4 * len(self.space.stored)) * 8
        parts = [bounds(part) for part in split_rows(x, rows_per_chunk(row_bytes))]
        lower, upper = (torch.cat(bound) for bound in zip(*parts, strict=True))
        return lower, upper


def _whitener(schur: Tensor, dtype: torch.dtype) -> Tensor:
    """Return S^(−½) without the directions inside L, in which S is only round-off of `dtype`."""
    eigenvalues, vectors = torch.linalg.eigh(schur)
    largest = eigenvalues[-1].abs()
    keep = eigenvalues > 4 * torch.finfo(dtype).eps * largest
    safe = eigenvalues[keep] + _ROUND_OFF * largest  # S is a difference: its round-off must not raise the lower bound
    whitener: Tensor = (vectors[:, keep] / safe.sqrt()).T
    return whitener
