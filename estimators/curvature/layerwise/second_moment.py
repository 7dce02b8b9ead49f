"""The sum Σ a aᵀ over the inputs a of a linear map, a factor of K-FAC, and its eigenvectors.

They are computed from the stored rows a, or from the matrix, whichever is smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SecondMoment"]


class SecondMoment:
    """Accumulates Σ a aᵀ (E, E) of rows a (n, E); stores the rows instead while they are fewer than E/2."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.n_rows, self.stored = 0, list[Tensor]()
        self.matrix: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows (n, E)."""
        self.n_rows += len(rows)
        self.stored.append(rows)
        if self.matrix is not None or 2 * self.n_rows > self.size:
            gathered = torch.cat(self.stored).to(self.dtype)
            new = gathered.T @ gathered
            self.matrix, self.stored = new if self.matrix is None else self.matrix + new, []

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (r,) and eigenvectors (E, r); r = E, or the number of rows if they are fewer than E/2.

        With rows R and Rᵀ = Q F, the eigenvectors of F Fᵀ (r, r) times Q are those of RᵀR with a non-zero eigenvalue.
        """
        if self.matrix is not None:
            eigenvalues, vectors = torch.linalg.eigh(self.matrix)
            return eigenvalues, vectors
        basis, factor = torch.linalg.qr(torch.cat(self.stored).to(self.dtype).T)
        eigenvalues, vectors = torch.linalg.eigh(factor @ factor.T)
        return eigenvalues, basis @ vectors
