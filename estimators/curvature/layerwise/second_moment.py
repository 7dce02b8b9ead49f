"""Σ a aᵀ and its eigenvectors, by whichever is smaller: the rows that were seen, or the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SecondMoment"]


class SecondMoment:
    """Accumulates Σ a aᵀ (E, E) of rows a (n, E); keeps the rows themselves as long as they are fewer than E/2."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.n_rows, self.kept = 0, list[Tensor]()
        self.matrix: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Rows (n, E)."""
        self.n_rows += len(rows)
        self.kept.append(rows)
        if self.matrix is not None or 2 * self.n_rows > self.size:
            gathered = torch.cat(self.kept).to(self.dtype)
            new = gathered.T @ gathered
            self.matrix, self.kept = new if self.matrix is None else self.matrix + new, []

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (r,) and vectors (E, r); r = E, or the number of rows where there are fewer than E/2.

        A = RᵀR with Rᵀ = Q F: the eigenvectors of F Fᵀ (r, r), turned by Q, are those of A that are not 0.
        """
        if self.matrix is not None:
            eigenvalues, vectors = torch.linalg.eigh(self.matrix)
            return eigenvalues, vectors
        basis, factor = torch.linalg.qr(torch.cat(self.kept).to(self.dtype).T)
        eigenvalues, vectors = torch.linalg.eigh(factor @ factor.T)
        return eigenvalues, basis @ vectors
