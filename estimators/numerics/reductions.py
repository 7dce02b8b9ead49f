"""Sums over rows of millions of numbers, in float64 whatever the rows are in, a part that stays in the cache at a time.

In float32 a sum over 10⁷ entries loses what the smallest eigenvalues, or the energy of a draw, are made of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.numerics.dtype import algebra_dtype

__all__ = ["combine_", "dots", "inner", "is_finite", "norms", "orthonormalise_"]

_LONG, _AT_ONCE = 2**13, 2**26  # columns in a part; on a GPU, which has more to do at once, numbers


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of rows (m, P) and (n, P): (m, n)."""
    wide = algebra_dtype(a.device)
    total = torch.zeros(len(a), len(b), dtype=wide, device=a.device)
    for part in _parts(a if len(a) > len(b) else b):
        total += a[:, part].to(wide) @ b[:, part].to(wide).T
    return total


def dots(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Row by row Σ_p w_p a_kp b_kp of rows (K, P), b (K, P) or (P,), w (P,) or ones: (K,)."""
    wide = algebra_dtype(a.device)
    total = torch.zeros(len(a), dtype=wide, device=a.device)
    for part in _parts(a):
        product = a[:, part].to(wide) * b[..., part].to(wide)
        total += (product if weights is None else product * weights[part].to(wide)).sum(1)
    return total


def norms(rows: Tensor) -> Tensor:
    """‖·‖ of rows (K, P), (K,); at least the smallest number of their dtype, to divide by."""
    return dots(rows, rows).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)


def combine_(rows: Tensor, coefficients: Tensor) -> Tensor:
    """The first rows of (m, P) become coefficients (n, m) @ rows, n <= m, in place: those, (n, P)."""
    for part in _parts(rows):
        rows[: len(coefficients), part] = (coefficients @ rows[:, part].to(coefficients.dtype)).to(rows.dtype)
    return rows[: len(coefficients)]


def orthonormalise_(rows: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q (k, P), k <= m, of the rows (m, P), in their place; and R (k, m), rowsᵀ = Qᵀ R.

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
    """R of rowsᵀ = Q R, part by part, (min(m, P), m)."""
    found: Tensor | None = None
    for part in _parts(rows):
        columns = rows[:, part].T.to(algebra_dtype(rows.device))
        found = torch.linalg.qr(columns if found is None else torch.cat([found, columns]), mode="r")[1]
    assert found is not None
    return found


def _parts(rows: Tensor) -> Iterator[slice]:
    length = _LONG if rows.device.type == "cpu" else max(_LONG, _AT_ONCE // max(1, len(rows)))
    for start in range(0, rows.shape[1], length):
        yield slice(start, start + length)


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no Inf: either would be in the sum, whose size alone decides where it overflows.

    A pass that reads, where `isfinite` writes a table of the tensor's size and reads it again.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
