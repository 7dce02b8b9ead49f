"""Bounds of A⁻¹ from below and above by a Krylov space, without further products.

In coordinates in which the prior precision is the identity, θ = s θ̃ with s = 1/√δ, A = G + I with the data's G ⪰ 0.
Let W be the orthonormal basis by rows, and Q the next block: A Wᵀ = Wᵀ T + Qᵀ B. Two matrices bound A⁻¹:

    from below   Wᵀ T⁻¹ W ⪯ A⁻¹                                   Galerkin: 0 outside the space
    from above   A⁻¹ ⪯ (G₀ + I)⁻¹,  G₀ = G Wᵀ (W G Wᵀ)⁻¹ W G ⪯ G  Nyström: the prior outside the space

G Wᵀ = [W; Q]ᵀ [T − I; B] is known. The second bound therefore costs the k rows of Q, and no product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.krylov.block_cg import BlockSolution
from estimators.curvature.krylov.stored_rows import StoredRows
from estimators.curvature.krylov.whitening import PriorWhitening

__all__ = ["KrylovSpace"]


@dataclass(frozen=True)
class KrylovSpace:
    """A Krylov space of A, with small matrices in float64.

    Attributes:
        stored: W and Q by rows (r + k, P), orthonormal in the coordinates θ/s.
        scale: s (P,).
        galerkin: T (r, r).
        coupling: B (k, r).
        reduction: R (q, r + k), by which the data reduce the prior variance: G₀(G₀ + I)⁻¹ = [W; Q]ᵀ Rᵀ R [W; Q].
        largest: the largest eigenvalue of T.
    """

    stored: StoredRows
    scale: Tensor
    galerkin: Tensor
    coupling: Tensor
    reduction: Tensor
    largest: Tensor

    @classmethod
    def of(
        cls, solved: BlockSolution, coordinates: PriorWhitening, delta: Tensor, dtype: torch.dtype | None = None
    ) -> KrylovSpace:
        """The space of a solve in `coordinates`, for prior precisions δ (P,), stored in `dtype`."""
        return cls.whitened(solved.basis, solved.projected, solved.coupling, coordinates, delta, dtype)

    @classmethod
    def whitened(
        cls,
        basis: Tensor,
        projected: Tensor,
        coupling: Tensor,
        coordinates: PriorWhitening,
        delta: Tensor,
        dtype: torch.dtype | None = None,
    ) -> KrylovSpace:
        """The space of W and Q (r + k, P), T (r, r) and Q A Wᵀ (k, r) in `coordinates`."""
        small = (matrix.double() / coordinates.unit for matrix in (projected, coupling))
        return cls._with(StoredRows.of(basis, dtype), delta.rsqrt(), *small)

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> KrylovSpace:
        """The space of a `state()`."""
        stored = StoredRows(tensors["basis"], tensors.get("scales"))
        return cls._with(stored, tensors["scale"], tensors["galerkin"], tensors["coupling"])

    @classmethod
    def _with(cls, stored: StoredRows, scale: Tensor, galerkin: Tensor, coupling: Tensor) -> KrylovSpace:
        """The space with the reduction that follows from T and B."""
        return cls(stored, scale, galerkin, coupling, *_reduction(galerkin, coupling, scale.dtype))

    def state(self) -> dict[str, Tensor]:
        """The tensors from which `restored` makes the space."""
        return {**self.stored.state(), "scale": self.scale, "galerkin": self.galerkin, "coupling": self.coupling}

    @property
    def basis(self) -> Tensor:
        """The stored rows (r + k, P) in the dtype of the computation."""
        return self.stored.rows

    @property
    def rank(self) -> int:
        """r, the number of vectors of the space."""
        return len(self.galerkin)

    @property
    def expansion(self) -> Tensor:
        """(r, r + k): s A s times the first r rows of the basis is expansion @ basis."""
        return torch.cat([self.galerkin, self.coupling]).T

    def reduction_of(self, rank: int, block: int) -> Tensor:
        """The reduction R of a leading space: the first `rank` vectors, with the `block` vectors after them as Q."""
        if rank == self.rank:
            return self.reduction
        projected = self.galerkin[:rank, :rank]
        return _reduction(projected, self.galerkin[rank : rank + block, :rank], self.scale.dtype)[0]


def _reduction(galerkin: Tensor, coupling: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """L⁻¹ Rᵀ with G₀ = [W; Q]ᵀ R Rᵀ [W; Q] and I + RᵀR = L Lᵀ, since R Rᵀ (R Rᵀ + I)⁻¹ = R (I + RᵀR)⁻¹ Rᵀ.

    Second, the largest eigenvalue of T.
    """
    r = len(galerkin)
    data = galerkin - torch.eye(r, dtype=galerkin.dtype, device=galerkin.device)  # W G Wᵀ
    eigenvalues, vectors = torch.linalg.eigh(data)
    keep = eigenvalues > 4 * torch.finfo(dtype).eps * eigenvalues[-1].abs()  # smaller ones are round-off
    root = torch.cat([data, coupling]) @ (vectors[:, keep] / eigenvalues[keep].sqrt())
    factor = torch.linalg.cholesky(torch.eye(root.shape[1], dtype=root.dtype, device=root.device) + root.T @ root)
    reduction: Tensor = torch.linalg.solve_triangular(factor, root.T, upper=False)
    return reduction, eigenvalues[-1] + 1
