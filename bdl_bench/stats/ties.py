"""Ties: numbers that differ by round-off count as equal, in ranks, in the choice of the best, and in tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["TIE_TOLERANCE", "is_tie", "merge_ties"]

Floats = NDArray[np.float64]

TIE_TOLERANCE = 1e-6
"""Relative difference up to which two means are a tie: eight roundings of float32, in which most networks compute."""
_SMALLEST = 1e-9
"""Absolute difference up to which two means are a tie, for metrics near 0, such as a calibration error."""


def is_tie(a: float, b: float) -> bool:
    """Return whether |a − b| <= max(1e-9, 1e-6 max(|a|, |b|)); equal infinities are a tie, a NaN is never one.

    Args:
        a: one number.
        b: another number of the same unit.

    Returns:
        Whether they differ by round-off at most.

    Example:
        >>> is_tie(0.3, 0.1 + 0.2), is_tie(0.3, 0.30001)
        (True, False)
    """
    return a == b or bool(abs(a - b) <= max(_SMALLEST, TIE_TOLERANCE * max(abs(a), abs(b))) < np.inf)


def merge_ties(values: Floats) -> Floats:
    """Return the numbers with each tie replaced by the lowest number of its group.

    Args:
        values: K numbers.

    Returns:
        K numbers. Each member of a group is a tie with its lowest one, so that long chains of small steps do not
        merge.
    """
    merged = values.copy()
    lowest = np.nan
    for i in np.argsort(values, kind="stable"):
        if not is_tie(lowest, values[i]):
            lowest = values[i]
        merged[i] = lowest
    return merged
