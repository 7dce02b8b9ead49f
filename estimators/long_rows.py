"""Sums over rows of millions of numbers, in float64 whatever the rows are in, a part that stays in the cache at a time.

In float32 a sum over 10⁷ entries loses what the smallest eigenvalues, or the energy of a draw, are made of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.precision.dtype import algebra_dtype

__all__ = ["dots", "inner"]

_LONG = 2**15


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of rows (m, P) and (n, P): (m, n)."""
    wide = algebra_dtype(a.device)
    if a.dtype == wide or a.shape[1] <= _LONG:
        return (a @ b.T).to(wide)
    total = torch.zeros(len(a), len(b), dtype=wide, device=a.device)
    for part in _parts(a):
        total += a[:, part] @ b[:, part].T
    return total


def dots(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Row by row Σ_p w_p a_kp b_kp of rows (K, P), b (K, P) or (P,), w (P,) or ones: (K,)."""
    wide = algebra_dtype(a.device)
    total = torch.zeros(len(a), dtype=wide, device=a.device)
    for part in _parts(a):
        product = a[:, part] * b[..., part]
        total += (product if weights is None else product * weights[part]).sum(1, dtype=wide)
    return total


def _parts(rows: Tensor) -> Iterator[slice]:
    for start in range(0, rows.shape[1], _LONG):
        yield slice(start, start + _LONG)
