"""Bounds of the variance at any x, from the Krylov space of a solve and the exact block."""

from __future__ import annotations

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
    """lower(x) ≤ J A⁻¹ Jᵀ ≤ upper(x), as matrices; both tend to it as the space grows (docs/math.md, section 5).

    lower: Galerkin over the space and the exact block L together, so never below the block's own covariance:

        Σ_L + (J Z) S⁻¹ (J Z)ᵀ,   Z = W − A_LL⁻¹ A_LW,   S = T − A_WL A_LL⁻¹ A_LW

    upper: J (G₀ + δ)⁻¹ Jᵀ, the prior's covariance less what the data of the space take away.
    """

    network: Network
    space: KrylovSpace
    block: RaoBlackwellBlock | None
    whitener: Tensor  # (q, r), its square is S⁻¹
    along_block: Tensor | None  # A_LL⁻¹ A_LW, (r, C, E)

    @classmethod
    def of(cls, network: Network, space: KrylovSpace, block: RaoBlackwellBlock | None) -> VarianceBounds:
        """Prepare the small matrices."""
        schur, along = space.galerkin, None
        if block is not None:
            scale = block.head.to_matrix(space.scale).square()
            image = torch.tensordot(space.expansion, (block.head.to_matrix(space.basis) / scale).double(), dims=1)
            along = block.precision.dense.solve(image.flatten(1)).view_as(image)
            schur = schur - image.flatten(1) @ along.flatten(1).T
        return cls(network, space, block, _whitener(0.5 * (schur + schur.T), space.scale.dtype), along)

    def variance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """lower and upper, (M, C)."""
        parts = [self._variance(part) for part in self._chunks(x)]
        lower, upper = (torch.cat(bound) for bound in zip(*parts, strict=True))
        return lower, upper

    def covariance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """lower and upper, (M, C, C)."""
        parts = [self._covariance(part) for part in self._chunks(x)]
        lower, upper = (torch.cat(bound) for bound in zip(*parts, strict=True))
        return lower, upper

    def _variance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        jacobian = self.network.jacobian(x)
        inside, taken = self._responses(x, jacobian)
        lower, dtype = inside.square().sum(0), self.network.theta.dtype
        if self.block is not None:
            lower = lower + self.block.variance(x)
        rows = jacobian.flatten(0, 1)
        prior = dots(rows, rows, self.space.scale.square()).view_as(lower)  # Σ_p J_cp² / δ_p
        upper = prior - taken.square().sum(0)
        return lower.to(dtype), torch.maximum(upper, lower).to(dtype)

    def _covariance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        jacobian = self.network.jacobian(x)
        inside, taken = self._responses(x, jacobian)
        lower, dtype = torch.einsum("rmc,rmd->mcd", inside, inside), self.network.theta.dtype
        if self.block is not None:
            lower = lower + self.block.covariance(x)
        prior = torch.stack([inner(rows, rows) for rows in jacobian.mul_(self.space.scale)])
        upper = prior - torch.einsum("rmc,rmd->mcd", taken, taken)
        return lower.to(dtype), upper.to(dtype)

    def _responses(self, x: PyTree, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """S^(−½) Z Jᵀ and what the data take away, (·, M, C) in float64."""
        response = inner(self.space.basis, jacobian.flatten(0, 1)).unflatten(1, jacobian.shape[:2])  # [W; Q] Jᵀ
        taken = torch.tensordot(self.space.seen, response, dims=1)
        inside = response[: self.space.rank]
        if self.block is not None and self.along_block is not None:
            inside = inside - self.block.response(self.along_block, x)
        return torch.tensordot(self.whitener, inside, dims=1), taken

    def _chunks(self, x: PyTree) -> list[PyTree]:
        """Rows whose Jacobians and responses fit."""
        n_outputs = self.network.outputs(x).shape[-1]
        a_row = n_outputs * (2 * self.network.n_parameters + 4 * len(self.space.stored)) * 8
        return list(split_rows(x, rows_per_chunk(a_row)))


def _whitener(schur: Tensor, dtype: torch.dtype) -> Tensor:
    """S^(−½) without the directions that lie in L, where S is round-off of `dtype`."""
    eigenvalues, vectors = torch.linalg.eigh(schur)
    largest = eigenvalues[-1].abs()
    keep = eigenvalues > 4 * torch.finfo(dtype).eps * largest
    safe = eigenvalues[keep] + _ROUND_OFF * largest  # S is a difference: its round-off must not raise the lower bound
    whitener: Tensor = (vectors[:, keep] / safe.sqrt()).T
    return whitener
