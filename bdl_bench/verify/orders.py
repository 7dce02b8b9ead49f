"""The order of convergence of an error in λ, fitted between the non-linear end and round-off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXPECTED", "QUADRATIC", "Order", "fit_order"]

EXPECTED = {"forward": (1.0, 0.1), "central": (2.0, 0.15)}
"""Order and tolerance of each difference."""

QUADRATIC = 1e-9
"""A refit whose error is this small at every λ minimises a quadratic: nothing is left to fit a slope to."""

_BENT = 0.07  # how far, in log error, a rung may lie from the line through its window: 7 %
_FEWEST = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """slope: of log error over log λ, None where there is none; lams: the rungs it was fitted to; note: why, in words.

    constant: the error at λ = 1 of the fitted line, constant · λ^slope.
    """

    slope: float | None
    lams: tuple[float, ...]
    note: str
    constant: float | None = None

    def as_expected(self, difference: str) -> bool:
        """Whether the slope is that of the difference, or the refit quadratic."""
        if self.slope is None:
            return self.note == "quadratic"
        order, tolerance = EXPECTED[difference]
        return abs(self.slope - order) <= tolerance


def fit_order(lams: Sequence[float], errors: Sequence[float | None]) -> Order:
    """Least squares on logarithms over the longest run of rungs that lie on a line; an error of None was refused.

    The run is chosen by its straightness alone, not by the slope that is hoped for: larger λ bend it by the next order,
    smaller ones by round-off. Rungs below the least error are round-off and not looked at.
    """
    rungs = sorted(((lam, error) for lam, error in zip(lams, errors, strict=True) if error is not None), reverse=True)
    if rungs and all(error <= QUADRATIC for _, error in rungs):
        return Order(None, (), "quadratic")
    rungs = rungs[: 1 + min(range(len(rungs)), key=lambda i: rungs[i][1], default=0)]
    x, y = (np.log([max(rung[i], 1e-300) for rung in rungs]) for i in (0, 1))
    for length in range(len(rungs), _FEWEST - 1, -1):
        windows = [slice(start, start + length) for start in range(len(rungs) - length + 1)]
        straightest = min(windows, key=lambda w: _bend(x[w], y[w]))
        if _bend(x[straightest], y[straightest]) <= _BENT:
            slope, offset = np.polyfit(x[straightest], y[straightest], 1)
            return Order(float(slope), tuple(lam for lam, _ in rungs[straightest]), "fitted", float(np.exp(offset)))
    return Order(None, (), f"fewer than {_FEWEST} rungs on a line between the non-linear end and round-off")


def _bend(x: Floats, y: Floats) -> float:
    """Largest distance from the line of least squares."""
    return float(np.abs(y - np.polyval(np.polyfit(x, y, 1), x)).max())
