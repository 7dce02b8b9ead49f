"""Kinks: points at which a derivative depends on the last digit of an activation.

Which number is the largest of a pool, or the sign before a ReLU, may depend on round-off, and two right derivatives are
then those of the two sides. A derivative that disagrees with plain autograd is taken for right if it disagrees at few
rows, and if each of them has a kink: the gradient of the row alone changes if its inputs change by round-off, and its
outputs do not. A wrong derivative disagrees at most rows, and a decision that changes the outputs is no kink.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.models.disagreement import Disagreement, largest_parameter_error
from estimators.models.user_module import UserModule
from estimators.numerics.pytrees import PyTree, n_rows, select_rows, with_floats

__all__ = ["ErrorOfRows", "disagreeing_rows", "has_kink"]

ErrorOfRows = Callable[[Tensor], Disagreement]
"""The error of a derivative with the cotangents of each row times its weight (B,), 0 or 1."""
_TRIALS = 8
"""Changes of the inputs by round-off. With one kink each of them passes it with probability ½."""
_UNITS = 4
"""Standard deviation of a relative change by round-off, in units of eps."""
_CONTINUOUS = 0.1
"""Largest relative change of the outputs at a kink, in units of the largest error that counts as round-off."""


def disagreeing_rows(x: PyTree, error: ErrorOfRows, tolerance: float) -> list[int]:
    """Return the rows at which a derivative disagrees, by halving; none if they are many, or if no row does alone.

    Args:
        x: inputs of B rows, which disagree together.
        error: the error of some of the rows.
        tolerance: the largest relative error that counts as round-off.

    Returns:
        Indices of at most 2 + B/128 rows.
    """
    n = n_rows(x)
    most, parts = 2 + n // 128, [range(n)]
    while any(len(part) > 1 for part in parts):
        halves = [half for part in parts for half in (part[: len(part) // 2], part[len(part) // 2 :]) if half]
        parts = []
        for half in halves:
            if not error(_weights(n, half)).within(tolerance):
                parts.append(half)
            if len(parts) > most:
                return []
    found = [row for part in parts for row in part]
    others = [row for row in range(n) if row not in found]
    return found if not others or error(_weights(n, others)).within(tolerance) else []


def _weights(n: int, rows: range | list[int]) -> Tensor:
    """1 at some of n rows, and 0 at the others."""
    return torch.zeros(n).index_fill_(0, torch.tensor(list(rows)), 1.0)


def has_kink(reference: UserModule, x: PyTree, row: int, random: Callable[[Tensor], Tensor], tolerance: float) -> bool:
    """Return whether the gradient at one row changes with its inputs by round-off, and its outputs do not.

    Args:
        reference: the module, differentiated by plain autograd.
        x: inputs of B rows.
        row: index of a row.
        random: function of a tensor that returns standard normal numbers in its shape and dtype.
        tolerance: the largest relative error that counts as round-off.
    """
    alone = with_floats(select_rows(x, slice(row, row + 1)), reference.input_dtype)
    u = random(reference.outputs(alone).flatten(1))
    f, g = reference.outputs_and_vjp(alone, u[None])
    entries = reference.subset.entries
    for _ in range(_TRIALS):
        near, other = reference.outputs_and_vjp(_changed_by_round_off(alone, random), u[None])
        is_continuous = float((near - f).norm()) <= _CONTINUOUS * tolerance * float(f.norm())
        if is_continuous and not largest_parameter_error(entries, other[0], g[0]).within(tolerance):
            return True
    return False


def _changed_by_round_off(x: PyTree, random: Callable[[Tensor], Tensor]) -> PyTree:
    """The inputs with relative changes by a few eps: zeros, and what is no floating-point number, stay the same."""

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + _UNITS * torch.finfo(tensor.dtype).eps * random(tensor))

    return pytree.tree_map_only(Tensor, changed, x)
