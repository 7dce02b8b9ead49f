"""The sum Σ a aᵀ over the inputs a of a linear map, a factor of K-FAC, and its eigenvectors.

They are computed from the stored rows a, or from the matrix, whichever is smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.numerics.symmetric import add_gram

__all__ = ["SecondMoment"]


class SecondMoment:
    """Accumulates the lower half of Σ a aᵀ (E, E) of rows a (n, E); while they are fewer than E/2, stores the rows.

    Args:
        size: E.
        dtype: the dtype of the matrix and its eigenvectors.
        keep_rows: whether rows may be stored. The matrix has all eigenvectors, stored rows only those of their span.
    """

    def __init__(self, size: int, dtype: torch.dtype, *, keep_rows: bool = True) -> None:
        self.size, self.dtype, self.keep_rows = size, dtype, keep_rows
        self.n_rows, self.stored = 0, list[Tensor]()
        self.matrix: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows (n, E)."""
        self.n_rows += len(rows)
        self.stored.append(rows)
        if self.matrix is not None or not self.keep_rows or 2 * self.n_rows > self.size:
            gathered = torch.cat(self.stored).to(self.dtype)
            self.matrix = gathered.new_zeros(self.size, self.size) if self.matrix is None else self.matrix
            add_gram(self.matrix, gathered.T)
            self.stored = []

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (r,) and eigenvectors (E, r); r = E, or the number of rows if they are fewer than E/2.

        With rows R and Rᵀ = Q F, the eigenvectors of F Fᵀ (r, r) times Q are those of RᵀR with a non-zero eigenvalue.
        """
        if self.matrix is not None:
            eigenvalues, vectors = torch.linalg.eigh(self.matrix, UPLO="L")
            return eigenvalues, vectors
        basis, factor = torch.linalg.qr(torch.cat(self.stored).to(self.dtype).T)
        eigenvalues, vectors = torch.linalg.eigh(factor @ factor.T)
        return eigenvalues, basis @ vectors
