"""Bounds of the variance at any x, from the Krylov space of a solve and the last-layer block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.models.network import Network
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.numerics.reductions import dots, inner
from estimators.regvar.rao_blackwell import RaoBlackwellBlock
from estimators.runtime.memory import rows_per_chunk

__all__ = ["Bounds", "BoundsOf", "LeadingSpace", "VarianceBounds"]

Bounds = tuple[Tensor, Tensor]
"""Lower and upper bound."""
LeadingSpace = tuple[int, int]
"""Number of the first vectors of a space that are a Krylov space themselves, and of the vectors in their next block."""

_ROUND_OFF = 64 * torch.finfo(torch.float64).eps
"""Error of an eigenvalue of S in units of the largest of T: S is formed in float64, as a difference of long sums."""


@dataclass(frozen=True)
class _SpaceMatrices:
    """The small matrices that give the bounds from one leading space.

    Args:
        rank: r, the number of vectors.
        whitener: matrix with whitenerᵀ whitener = S⁻¹, (q, r).
        reduction: R of `KrylovSpace`, (q, r + k).
    """

    rank: int
    whitener: Tensor
    reduction: Tensor


@dataclass(frozen=True)
class VarianceBounds:
    """Matrices lower(x) ≤ J A⁻¹ Jᵀ ≤ upper(x); both converge to it as the Krylov space grows (docs/math.md, section 5).

    lower: Galerkin projection on the space and the last layer L together, so never below the last-layer covariance:

        Σ_L + (J Z) S⁻¹ (J Z)ᵀ,   Z = W − A_LL⁻¹ A_LW,   S = T − A_WL A_LL⁻¹ A_LW

    Weights U outside of L whose derivative is 0 at every training row keep their prior, and no space contains them:
    their covariance J_U δ⁻¹ J_Uᵀ is added.

    upper: J (G₀ + δ)⁻¹ Jᵀ, with G₀ ⪯ G the data's curvature as far as the space has seen it: the prior covariance
    less a matrix of low rank.

    Args:
        network: the network at θ̂.
        space: Krylov space W, rank r, and T = Wᵀ A W.
        block: the last-layer block L, or None.
        spaces: matrices of each leading space that bounds are wanted from; those of the whole space last.
        along_block: A_LL⁻¹ A_LW, (r, C, E), or None.
        untouched: the weights U, bool (P,); None if there are none.
    """

    network: Network
    space: KrylovSpace
    block: RaoBlackwellBlock | None
    spaces: tuple[_SpaceMatrices, ...]
    along_block: Tensor | None
    untouched: Tensor | None = None

    @classmethod
    def of(
        cls,
        network: Network,
        space: KrylovSpace,
        leading: Sequence[LeadingSpace] = (),
        *,
        block: RaoBlackwellBlock | None = None,
        untouched: Tensor | None = None,
    ) -> VarianceBounds:
        """Return the bounds of a Krylov space, and of some of its leading spaces.

        Args:
            network: the network at θ̂.
            space: the space, in which untouched weights have no part.
            leading: leading spaces that bounds are wanted from, too.
            block: the last-layer block, or None.
            untouched: weights whose derivative is 0 at every training row, bool (P,), or None.
        """
        schur, along = space.galerkin, None
        if block is not None:
            scale = block.last_layer.to_matrix(space.scale)
            image = torch.tensordot(space.expansion, (block.last_layer.to_matrix(space.basis) / scale).double(), dims=1)
            along = block.precision.dense.solve(image.flatten(1)).view_as(image)
            schur = schur - image.flatten(1) @ along.flatten(1).T
            untouched = None if untouched is None else untouched & ~block.mask  # Σ_L has these
        schur = 0.5 * (schur + schur.T)
        wanted = [*leading, (space.rank, len(space.coupling))]
        matrices = [
            _SpaceMatrices(r, _whitener(schur[:r, :r], space.largest, space.scale.dtype), space.reduction_of(r, k))
            for r, k in wanted
        ]
        untouched = None if untouched is None or not bool(untouched.any()) else untouched
        return cls(network, space, block, tuple(matrices), along, untouched)

    @classmethod
    def restored(
        cls,
        network: Network,
        tensors: Mapping[str, Tensor],
        block: RaoBlackwellBlock | None,
        leading: Callable[[int], Sequence[LeadingSpace]] = lambda _: (),
    ) -> VarianceBounds:
        """Return the bounds of a `state()`; `leading` returns the leading spaces that are wanted, from the rank."""
        space = KrylovSpace.restored(tensors)
        return cls.of(network, space, leading(space.rank), block=block, untouched=tensors.get("untouched"))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which `restored` makes the bounds, beside those of the block."""
        untouched = {} if self.untouched is None else {"untouched": self.untouched}
        return {**self.space.state(), **untouched}

    def on(self, space: KrylovSpace, leading: Sequence[LeadingSpace] = ()) -> VarianceBounds:
        """Return the bounds of another space."""
        return VarianceBounds.of(self.network, space, leading, block=self.block, untouched=self.untouched)

    def variance(self, x: PyTree) -> Bounds:
        """Return lower and upper bound of the variance, (M, C) each, from the whole space."""
        return self.variances(x)[-1]

    def variances(self, x: PyTree) -> list[Bounds]:
        """Return lower and upper bound of the variance, (M, C) each, from each of `spaces`."""
        return self._in_chunks(self._variances, x)

    def variances_along(self, jacobian: Tensor) -> list[Bounds]:
        """Return bounds of the diagonal of J A⁻¹ Jᵀ, (M, C) each in float64, from each of `spaces`."""
        return [
            (lower, torch.maximum(upper, lower))
            for lower, upper in (
                (last_layer + projected.square().sum(0), prior - removed.square().sum(0))
                for projected, removed, last_layer, prior in self._along_jacobian(jacobian, diagonal=True)
            )
        ]

    def covariance_along(self, jacobian: Tensor) -> Bounds:
        """Return lower and upper bound of J A⁻¹ Jᵀ, (M, C, C) each in float64, differentiable in J (M, C, P)."""
        projected, removed, last_layer, prior = self._along_jacobian(jacobian, diagonal=False)[-1]
        lower = last_layer + torch.einsum("rmc,rmd->mcd", projected, projected)
        return lower, prior - torch.einsum("rmc,rmd->mcd", removed, removed)

    def _along_jacobian(self, jacobian: Tensor, *, diagonal: bool) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return, for each of `spaces`, what both bounds are made of: `_projected`, Σ_L, and J δ⁻¹ Jᵀ."""
        wide = to_algebra_dtype(jacobian)
        scaled = wide * self.space.scale.to(wide.dtype)
        response = torch.einsum("rp,mcp->rmc", self.space.basis.to(wide.dtype), scaled)
        prior = scaled.square().sum(-1) if diagonal else scaled @ scaled.transpose(1, 2)
        last_layer, along = torch.zeros_like(prior), None
        if self.block is not None and self.along_block is not None:
            last_layer, along = self.block.covariance_along(wide), self.block.response_along(self.along_block, wide)
            last_layer = last_layer.diagonal(dim1=1, dim2=2) if diagonal else last_layer
        if self.untouched is not None:
            kept = scaled[..., self.untouched]
            last_layer = last_layer + (kept.square().sum(-1) if diagonal else kept @ kept.transpose(1, 2))
        return [(*_projected(small, response, along), last_layer, prior) for small in self.spaces]

    def covariance(self, x: PyTree) -> Bounds:
        """Return lower and upper bound of the covariance, (M, C, C) each, from the whole space."""
        return self._in_chunks(self._covariance, x)[-1]

    def variances_of_gradients(self, gradients: Tensor) -> list[Bounds]:
        """Return bounds of gᵀA⁻¹g, (m,) each in float64, from each of `spaces`.

        Args:
            gradients: g, (m, P), such as rows of the Jacobian.
        """
        response = inner(self.space.basis, self.space.scale * gradients)
        prior = dots(gradients, gradients, self.space.scale.square())
        untouched = self._untouched_variance(gradients).to(prior)
        if self.block is None or self.along_block is None:
            return self._bounds(response, prior, untouched, None)
        inside = self.block.last_layer.to_matrix(gradients).flatten(1).to(self.along_block.dtype)
        last_layer = (self.block.precision.dense.solve(inside) * inside).sum(1)
        return self._bounds(response, prior, last_layer + untouched, self.along_block.flatten(1) @ inside.T)

    def _variances(self, x: PyTree) -> list[Bounds]:
        jacobian = self.network.jacobian(x)
        rows = jacobian.flatten(0, 1)
        prior = dots(rows, rows, self.space.scale.square()).view(jacobian.shape[:2])  # Σ_p J_cp² / δ_p
        last_layer, along = self._last_layer(x, jacobian)
        certain = last_layer.to(prior) + self._untouched_variance(jacobian).to(prior)
        found = self._bounds(self._response(jacobian.mul_(self.space.scale)), prior, certain, along)
        dtype = self.network.theta.dtype
        return [(lower.to(dtype), upper.to(dtype)) for lower, upper in found]

    def _untouched_variance(self, jacobian: Tensor) -> Tensor:
        """Return Σ_U J² / δ, without the last dimension of `jacobian`, (..., P)."""
        if self.untouched is None:
            return jacobian.new_zeros(jacobian.shape[:-1])
        rows, variance = jacobian.flatten(0, -2), torch.where(self.untouched, self.space.scale.square(), 0)
        return dots(rows, rows, variance).view(jacobian.shape[:-1])  # without a copy of these columns

    def _bounds(self, response: Tensor, prior: Tensor, last_layer: Tensor, along: Tensor | None) -> list[Bounds]:
        """Return the bounds from [W; Q] s Jᵀ (r + k, ...), J δ⁻¹ Jᵀ, the variance of L and U, and A_WL A_LL⁻¹ J_Lᵀ."""
        bounds = []
        for small in self.spaces:
            projected, removed = _projected(small, response, along)
            lower = last_layer + projected.square().sum(0)
            bounds.append((lower, torch.maximum(prior - removed.square().sum(0), lower)))
        return bounds

    def _covariance(self, x: PyTree) -> list[Bounds]:
        jacobian = self.network.jacobian(x).mul_(self.space.scale)
        projected, removed = _projected(self.spaces[-1], self._response(jacobian), self._along(x))
        lower, dtype = torch.einsum("rmc,rmd->mcd", projected, projected), self.network.theta.dtype
        if self.block is not None:
            lower = lower + self.block.covariance(x)
        if self.untouched is not None:
            kept = to_algebra_dtype(jacobian[..., self.untouched])
            lower = lower + kept @ kept.transpose(1, 2)
        prior = torch.stack([inner(rows, rows) for rows in jacobian])
        upper = prior - torch.einsum("rmc,rmd->mcd", removed, removed)
        return [(lower.to(dtype), upper.to(dtype))]

    def _response(self, scaled_jacobian: Tensor) -> Tensor:
        """Return [W; Q] s Jᵀ, (r + k, M, C) in float64, from J s."""
        response: Tensor = inner(self.space.basis, scaled_jacobian.flatten(0, 1)).unflatten(
            1, scaled_jacobian.shape[:2]
        )
        return response

    def _along(self, x: PyTree) -> Tensor | None:
        """Return A_WL A_LL⁻¹ J_Lᵀ, (r, M, C), or None without a last-layer block."""
        if self.block is None or self.along_block is None:
            return None
        return self.block.response(self.along_block, x)

    def _last_layer(self, x: PyTree, jacobian: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the last-layer variance (M, C), and A_WL A_LL⁻¹ J_Lᵀ (r, M, C)."""
        if self.block is None or self.along_block is None:
            return jacobian.new_zeros(jacobian.shape[:2]), None
        features = self.block.features_in(jacobian)
        if features is None:
            return self.block.variance(x), self._along(x)
        return self.block.precision.variance(features), self.block.response_at(self.along_block, features)

    def _in_chunks(self, bounds: Callable[[PyTree], list[Bounds]], x: PyTree) -> list[Bounds]:
        """Return `bounds` of x, computed for as many rows together as fit into memory with Jacobian and responses."""
        n_outputs = self.network.outputs(x).shape[-1]
        row_bytes = n_outputs * (2 * self.network.n_parameters + 4 * len(self.space.stored)) * 8
        parts = [bounds(part) for part in split_rows(x, rows_per_chunk(row_bytes))]
        return [
            (torch.cat([lower for lower, _ in of_parts]), torch.cat([upper for _, upper in of_parts]))
            for of_parts in zip(*parts, strict=True)
        ]


BoundsOf = Callable[[KrylovSpace, Sequence[LeadingSpace]], VarianceBounds]
"""A Krylov space and some of its leading spaces -> bounds of the variance."""


def _projected(small: _SpaceMatrices, response: Tensor, along: Tensor | None) -> Bounds:
    """Return S^(−½) Zᵀ Jᵀ, whose squares give the lower bound, and R [W; Q] s Jᵀ, which lowers the upper bound."""
    inside = response[: small.rank]
    if along is not None:
        inside = inside - along[: small.rank]
    removed = torch.tensordot(small.reduction, response[: small.reduction.shape[1]], dims=1)
    return torch.tensordot(small.whitener, inside, dims=1), removed


def _whitener(schur: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return S^(−½) without the directions inside L, in which S is only round-off of `dtype`.

    Args:
        schur: S.
        largest: the largest eigenvalue of T. S is a difference from T, whose round-off must not raise the lower bound.
        dtype: that of the vectors.
    """
    eigenvalues, vectors = torch.linalg.eigh(schur)
    keep = eigenvalues > 4 * torch.finfo(dtype).eps * eigenvalues[-1].abs()
    safe = eigenvalues[keep] + _ROUND_OFF * largest
    whitener: Tensor = (vectors[:, keep] / safe.sqrt()).T
    return whitener
