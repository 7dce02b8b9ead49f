"""The order of convergence of an error in λ, fitted between the non-linear end and round-off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["EXPECTED", "Order", "fit_order"]

EXPECTED = {"forward": (1.0, 0.1), "central": (2.0, 0.15)}
"""Order and tolerance of each difference."""

_QUADRATIC = 1e-9
_LINEAR_BELOW = {"forward": 3e-2, "central": 3e-3}  # a larger error has terms of the next order in it
_ABOVE_FLOOR = 50.0  # times the least error of the ladder, which round-off set


@dataclass(frozen=True)
class Order:
    """slope: of log error over log λ, None where there is none; lams: the rungs it was fitted to; note: why, in words."""

    slope: float | None
    lams: tuple[float, ...]
    note: str

    def as_expected(self, difference: str) -> bool:
        """Whether the slope is that of the difference, or the refit quadratic."""
        if self.slope is None:
            return self.note == "quadratic"
        order, tolerance = EXPECTED[difference]
        return abs(self.slope - order) <= tolerance


def fit_order(lams: Sequence[float], errors: Sequence[float | None], difference: str) -> Order:
    """Least squares on logarithms over the rungs in between; an error of None is a rung that was refused."""
    rungs = [(lam, error) for lam, error in zip(lams, errors, strict=True) if error is not None]
    if rungs and all(error <= _QUADRATIC for _, error in rungs):
        return Order(None, (), "quadratic")
    floor = min((error for _, error in rungs), default=0.0)
    lowest = min((lam for lam, error in rungs if error == floor), default=0.0)
    inside = [
        (lam, error)
        for lam, error in rungs
        if lam > lowest and _ABOVE_FLOOR * floor < error < _LINEAR_BELOW[difference]
    ]
    if len(inside) < 2:
        return Order(None, (), "fewer than two rungs between the non-linear end and round-off")
    x, y = (np.log([rung[i] for rung in inside]) for i in (0, 1))
    slope = float(np.polyfit(x, y, 1)[0])
    return Order(slope, tuple(lam for lam, _ in inside), "fitted")
