"""Kinks: points at which a derivative depends on the last digit of an activation.

Which number is the largest of a pool, or the sign before a ReLU, may depend on round-off. Two right derivatives are
then those of the two sides, and differ by as much as the gradient changes if the inputs change by round-off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.models.disagreement import Disagreement
from estimators.numerics.pytrees import PyTree

__all__ = ["with_kinks", "with_round_off"]

_TRIALS = 8
"""Changes of the inputs by round-off. With one kink each of them passes it with probability ½."""
_LARGEST = 0.5
"""Relative error above which a disagreement is none of a kink."""
_UNITS = 4
"""Standard deviation of a relative change by round-off, in units of eps."""


def with_round_off(x: PyTree, random: Callable[[Tensor], Tensor]) -> PyTree:
    """Return inputs with relative changes by a few eps: zeros, and what is no floating-point number, stay the same.

    Args:
        x: inputs.
        random: function of a tensor that returns standard normal numbers in its shape and dtype.

    Returns:
        Inputs of the same structure.
    """

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + _UNITS * torch.finfo(tensor.dtype).eps * random(tensor))

    return pytree.tree_map_only(Tensor, changed, x)


def with_kinks(found: Disagreement, tolerance: float, change: Callable[[], Disagreement]) -> Disagreement:
    """Return a disagreement that is allowed if the gradient itself changes by half of it or more by round-off.

    Args:
        found: the error of a derivative.
        tolerance: the largest relative error that counts as round-off.
        change: computes the relative change of the gradient by another change of the inputs by round-off.

    Returns:
        The error, with the allowance that makes it round-off, or without one.
    """
    if found.within(tolerance) or not found.error <= _LARGEST:
        return found
    if any(found.error <= 2 * change().error for _ in range(_TRIALS)):
        return replace(found, allowance=found.error / tolerance)
    return found
