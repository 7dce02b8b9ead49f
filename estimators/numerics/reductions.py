"""Sums over rows of millions of numbers, in float64 for any dtype of the rows, in chunks that fit into the cache.

A sum over 10⁷ entries in float32 loses the digits that determine the smallest eigenvalues and the A-norm of a draw.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.numerics.dtype import algebra_dtype

__all__ = ["combine_", "dots", "inner", "is_finite", "norms", "orthonormalise_"]

_COLUMNS = 2**13
"""Columns per chunk on a CPU."""
_GPU_ENTRIES = 2**26
"""Entries per chunk on a GPU, which needs larger chunks to be busy."""


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ, (m, n), of rows a (m, P) and b (n, P)."""
    wide = algebra_dtype(a.device)
    total = torch.zeros(len(a), len(b), dtype=wide, device=a.device)
    for part in _parts(a if len(a) > len(b) else b):
        total += a[:, part].to(wide) @ b[:, part].to(wide).T
    return total


def dots(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ_p w_p a_kp b_kp per row, (K,), of a (K, P), b (K, P) or (P,), and weights (P,) or ones."""
    wide = algebra_dtype(a.device)
    total = torch.zeros(len(a), dtype=wide, device=a.device)
    for part in _parts(a):
        product = a[:, part].to(wide) * b[..., part].to(wide)
        total += (product if weights is None else product * weights[part].to(wide)).sum(1)
    return total


def norms(rows: Tensor) -> Tensor:
    """Return the norms (K,) of rows (K, P), at least the smallest positive number of their dtype."""
    return dots(rows, rows).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)


def combine_(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Replace the first n rows of (m, P) by coefficients (n, m) @ rows, in place, and return them, (n, P)."""
    for part in _parts(rows):
        rows[: len(coefficients), part] = (coefficients @ rows[:, part].to(coefficients.dtype)).to(rows.dtype)
    return rows[: len(coefficients)]


def orthonormalise_(rows: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Replace rows (m, P) by an orthonormal basis Q (k, P), k <= m; return Q and R (k, m) with rowsᵀ = Qᵀ R.

    Directions whose singular value is at most `floor`, or round-off of the largest, are dropped.
    """
    triangular = _triangular(rows)
    eps = torch.finfo(triangular.dtype).eps
    _, singular, right = torch.linalg.svd(triangular, full_matrices=False)  # rowsᵀ = Q₁ U S Vᵀ: Q = S⁻¹ Vᵀ rows
    keep = singular > torch.maximum(floor.to(singular.dtype), eps * singular[:1])
    kept = singular[keep, None]
    basis, factor = combine_(rows, right[keep] / kept), kept * right[keep]
    if len(kept) and eps * kept[0] / kept[-1] > 2 * torch.finfo(rows.dtype).eps:  # the smallest are only nearly so
        basis, second = orthonormalise_(basis, torch.zeros_like(floor))
        factor = second @ factor
    return basis, factor


def _triangular(rows: Tensor) -> Tensor:
    """Return R (min(m, P), m) of rowsᵀ = Q R, computed chunk by chunk."""
    found: Tensor | None = None
    for part in _parts(rows):
        columns = rows[:, part].T.to(algebra_dtype(rows.device))
        found = torch.linalg.qr(columns if found is None else torch.cat([found, columns]), mode="r")[1]
    assert found is not None
    return found


def _parts(rows: Tensor) -> Iterator[slice]:
    length = _COLUMNS if rows.device.type == "cpu" else max(_COLUMNS, _GPU_ENTRIES // max(1, len(rows)))
    for start in range(0, rows.shape[1], length):
        yield slice(start, start + length)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no Inf.

    A finite sum implies it in one pass that only reads; `isfinite` writes a mask of the tensor's size.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
