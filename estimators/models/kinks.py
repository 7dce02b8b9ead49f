"""Kinks: points at which a derivative depends on the last digit of an activation.

Which number is the largest of a pool, or the sign before a ReLU, may depend on round-off, and two right derivatives are
then those of the two sides. A derivative that disagrees with plain autograd is taken for right if it disagrees at few
rows, and if a kink of each of them explains it: the gradient of the row alone changes by a third of the disagreement
or more if its inputs change by round-off, and its outputs do not. A wrong derivative disagrees at most rows, and what
changes the outputs is no kink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.models.disagreement import Disagreement, largest_parameter_error
from estimators.models.failures import FAILURES, is_final_error
from estimators.models.user_module import UserModule
from estimators.numerics.pytrees import PyTree, n_rows, with_floats

__all__ = ["ErrorOfRows", "RoundOff", "disagreeing_rows", "kink_explains"]

ErrorOfRows = Callable[[Tensor], Disagreement]
"""The error of a derivative with the cotangents of each row times its weight (B,), 0 or 1."""
_TRIALS = 16
"""Changes of the inputs by round-off, each with its own cotangent. With one kink it is passed with probability ½."""
_SHARE = 3
"""Largest error, in units of the largest change: they belong to different cotangents."""


@dataclass(frozen=True)
class RoundOff:
    """Round-off of a module.

    Attributes:
        tolerance: the largest relative error of a derivative that counts as round-off.
        units: standard deviation of a relative change of the inputs, in units of eps.
        jump: the relative change of the outputs from which on they are not continuous.
    """

    tolerance: float
    units: float
    jump: float


def disagreeing_rows(x: PyTree, error: ErrorOfRows, tolerance: float) -> dict[int, float]:
    """Return the rows at which a derivative disagrees, with their errors, by halving.

    Args:
        x: inputs of B rows, which disagree together.
        error: the error of some of the rows.
        tolerance: the largest relative error that counts as round-off.

    Returns:
        The errors of four to eight rows at most, by index; nothing if more rows disagree, or if no row does alone.
    """
    n = n_rows(x)
    most, parts = min(8, max(4, n // 16)), [range(n)]
    while any(len(part) > 1 for part in parts):
        halves = [half for part in parts for half in (part[: len(part) // 2], part[len(part) // 2 :]) if half]
        parts = []
        for half in halves:
            if not error(_weights(n, half)).within(tolerance):
                parts.append(half)
            if len(parts) > most:
                return {}
    found = {part[0]: error(_weights(n, part)).error for part in parts}
    others = [row for row in range(n) if row not in found]
    return found if not others or error(_weights(n, others)).within(tolerance) else {}


def _weights(n: int, rows: Sequence[int]) -> Tensor:
    """1 at some of n rows, and 0 at the others."""
    return torch.zeros(n).index_fill_(0, torch.tensor(list(rows)), 1.0)


def kink_explains(
    error: float, module: UserModule, row: PyTree, random: Callable[[Tensor], Tensor], round_off: RoundOff
) -> bool:
    """Return whether the gradient at a row changes by a third of an error or more if its inputs change by round-off.

    Args:
        error: the relative error of a derivative at the row.
        module: the module, differentiated by plain autograd.
        row: inputs of one row.
        random: function of a tensor that returns standard normal numbers in its shape and dtype.
        round_off: that of the module.
    """
    if not isfinite(error):
        return False
    row = with_floats(row, module.input_dtype)
    try:
        like = module.outputs(row).flatten(1)
        for _ in range(_TRIALS):
            u = random(like)[None]
            f, g = module.outputs_and_vjp(row, u)
            near, other = module.outputs_and_vjp(_changed(row, random, round_off.units), u)
            change = largest_parameter_error(module.subset.entries, other[0], g[0]).error
            is_continuous = float((near - f).norm()) <= round_off.jump * float(f.norm())
            if is_continuous and change > round_off.tolerance and error <= _SHARE * change:
                return True
    except FAILURES as failure:  # a module that takes no single row
        if is_final_error(failure):
            raise
    return False


def _changed(x: PyTree, random: Callable[[Tensor], Tensor], units: float) -> PyTree:
    """The inputs with relative changes by round-off: zeros, and what is no floating-point number, stay the same."""

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + units * torch.finfo(tensor.dtype).eps * random(tensor))

    return pytree.tree_map_only(Tensor, changed, x)
