"""What a Krylov space knows of A⁻¹: a bound from below and one from above, for nothing more than the products made.

In the coordinates where the prior is the identity, θ = s θ̃ with s = 1/√δ, A = G + I with G ⪰ 0 the data's part. Let
W be the orthonormal basis by rows, Q the block that would come next, A Wᵀ = Wᵀ T + Qᵀ B. Two matrices bound A⁻¹:

    from below   Wᵀ T⁻¹ W ⪯ A⁻¹                                   Galerkin: nothing outside the space
    from above   A⁻¹ ⪯ (G₀ + I)⁻¹,  G₀ = G Wᵀ (W G Wᵀ)⁻¹ W G ⪯ G  Nyström: the data seen so far, the prior elsewhere

G Wᵀ = [W; Q]ᵀ [T − I; B] is known, so that the second costs the k rows of Q and no product.
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
    """stored (r + k, P): s·W and s·Q by rows, in the coordinates of θ; scale (P,): s.

    galerkin (r, r): T; coupling (k, r): B; seen (q, r + k): what the data take from the prior's variance,
    G₀(G₀ + I)⁻¹ = [W; Q]ᵀ seenᵀ seen [W; Q]. The small matrices are in float64.
    """

    stored: StoredRows
    scale: Tensor
    galerkin: Tensor
    coupling: Tensor
    seen: Tensor

    @classmethod
    def of(
        cls, solved: BlockSolution, coordinates: PriorWhitening, delta: Tensor, dtype: torch.dtype | None = None
    ) -> KrylovSpace:
        """The space of a solve in `coordinates`, for prior precisions δ (P,), kept in `dtype`.

        The solve's basis is scaled in place: it is not to be used afterwards.
        """
        stored = StoredRows.of(solved.basis.mul_(coordinates.whitener), dtype)
        projected, coupling = (small.double() / coordinates.unit for small in (solved.projected, solved.coupling))
        return cls._with(stored, delta.rsqrt(), projected, coupling)

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> KrylovSpace:
        """From `state()`."""
        stored = StoredRows(tensors["basis"], tensors.get("sizes"))
        return cls._with(stored, tensors["scale"], tensors["galerkin"], tensors["coupling"])

    @classmethod
    def _with(cls, stored: StoredRows, scale: Tensor, galerkin: Tensor, coupling: Tensor) -> KrylovSpace:
        """What the data have taken is computed from T and B."""
        return cls(stored, scale, galerkin, coupling, _seen(galerkin, coupling, scale.dtype))

    def state(self) -> dict[str, Tensor]:
        """What `restored` takes."""
        return {**self.stored.state(), "scale": self.scale, "galerkin": self.galerkin, "coupling": self.coupling}

    @property
    def basis(self) -> Tensor:
        """The stored rows, to compute with."""
        return self.stored.rows

    @property
    def rank(self) -> int:
        """r."""
        return len(self.galerkin)

    @property
    def expansion(self) -> Tensor:
        """(r, r + k): s² A times the first r rows of the basis is expansion @ basis."""
        return torch.cat([self.galerkin, self.coupling]).T


def _seen(galerkin: Tensor, coupling: Tensor, dtype: torch.dtype) -> Tensor:
    """L⁻¹ Rᵀ with G₀ = [W; Q]ᵀ R Rᵀ [W; Q] and I + RᵀR = L Lᵀ, since R Rᵀ (R Rᵀ + I)⁻¹ = R (I + RᵀR)⁻¹ Rᵀ."""
    r = len(galerkin)
    data = galerkin - torch.eye(r, dtype=galerkin.dtype, device=galerkin.device)  # W G Wᵀ
    eigenvalues, vectors = torch.linalg.eigh(data)
    keep = eigenvalues > 4 * torch.finfo(dtype).eps * eigenvalues[-1].abs()  # less is round-off: left to the prior
    root = torch.cat([data, coupling]) @ (vectors[:, keep] / eigenvalues[keep].sqrt())
    factor = torch.linalg.cholesky(torch.eye(root.shape[1], dtype=root.dtype, device=root.device) + root.T @ root)
    seen: Tensor = torch.linalg.solve_triangular(factor, root.T, upper=False)
    return seen
