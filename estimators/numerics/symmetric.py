"""Products R Rᵀ that compute the lower half and copy it to the upper half."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["add_gram", "gram", "mirror"]

_BLOCK = 512
"""Columns per block."""


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add R Rᵀ of rows R (n, m) to the lower half of total (n, n); above the diagonal it is left unfinished."""
    for below, columns in _lower_blocks(len(rows)):
        total[below, columns].addmm_(rows[below], rows[columns].T)


def mirror(total: Tensor) -> None:
    """Copy the lower half of total (n, n) to the upper one."""
    for below, columns in _lower_blocks(len(total)):
        square = total[columns, columns].tril()
        total[columns, columns] = square + square.tril(-1).T
        total[columns, columns.stop : below.stop] = total[columns.stop : below.stop, columns].T


def gram(rows: Tensor) -> Tensor:
    """Return R Rᵀ (n, n) of rows R (n, m)."""
    total = rows.new_zeros(len(rows), len(rows))
    add_gram(total, rows)
    mirror(total)
    return total


def _lower_blocks(n: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks (rows from the diagonal down, columns) that cover the lower half of (n, n)."""
    for start in range(0, n, _BLOCK):
        yield slice(start, n), slice(start, min(start + _BLOCK, n))
