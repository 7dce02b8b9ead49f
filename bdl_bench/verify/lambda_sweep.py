"""The λ sweep: errors of RegVar's refits at decreasing λ, and their order of convergence, fitted above round-off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from estimators import NewtonRefit, Pointwise, RegVar
from estimators.errors import ConvergenceError, LambdaTooLargeError

__all__ = ["EXPECTED", "LAMS", "QUADRATIC", "LambdaSweep", "Order", "fit_order", "relative_error", "run_sweep"]

LAMS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
"""From λ at which refits are clearly nonlinear to λ at which round-off dominates."""
EXPECTED = {"forward": (1.0, 0.1), "central": (2.0, 0.15)}
"""Order and tolerance of each difference."""
QUADRATIC = 1e-9
"""If the error is at most this at every λ, the refit minimises a quadratic and has no slope."""
_MAX_DEVIATION = 0.07
"""Largest distance of log error from the fitted line, that is 7 % of the error."""
_MIN_STEPS = 3
"""Fewest values of λ that a slope is fitted to."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LambdaSweep:
    """Errors of refits with "forward" or "central" differences at decreasing λ: max difference over max value.

    A refit that raised has no error; `raised` has the name of what it raised.
    """

    difference: str
    lams: tuple[float, ...]
    errors: tuple[float | None, ...]
    raised: tuple[str | None, ...]

    @property
    def order(self) -> Order:
        """The fitted order of convergence."""
        return fit_order(self.lams, self.errors)

    @property
    def best(self) -> float:
        """The smallest error of the sweep."""
        return min((error for error in self.errors if error is not None), default=float("inf"))

    def at(self, lam: float) -> float | None:
        """Return the error at one λ of the sweep."""
        return self.errors[self.lams.index(lam)]


def run_sweep(
    fitted: RegVar, x: object, exact: Tensor, *, difference: str, lams: Sequence[float] = LAMS
) -> LambdaSweep:
    """Return the errors of Newton refits at each λ against the exact covariance (M, C, C) at x.

    `fitted` has the regularizer Pointwise(), which solves at each query, so that its solver can be replaced.
    """
    assert isinstance(fitted.regularizer, Pointwise)
    errors: list[float | None] = []
    raised: list[str | None] = []
    before = fitted.solver
    try:
        for lam in lams:
            fitted.solver = NewtonRefit(lam, difference)
            try:
                errors.append(relative_error(fitted.covariance(x), exact))
                raised.append(None)
            except (LambdaTooLargeError, ConvergenceError) as error:
                errors.append(None)
                raised.append(type(error).__name__)
    finally:
        fitted.solver = before
    return LambdaSweep(difference, tuple(lams), tuple(errors), tuple(raised))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return max |found − exact| / max |exact|."""
    return float((found - exact).abs().max() / exact.abs().max())


@dataclass(frozen=True)
class Order:
    """The fitted line, error ≈ constant · λ^slope, and the values of λ that it was fitted to.

    `note` is "fitted", "quadratic", or why there is no slope.
    """

    slope: float | None
    lams: tuple[float, ...]
    note: str
    constant: float | None = None

    def as_expected(self, difference: str) -> bool:
        """Return whether the slope is that of the difference, or the refit minimises a quadratic."""
        if self.slope is None:
            return self.note == "quadratic"
        order, tolerance = EXPECTED[difference]
        return abs(self.slope - order) <= tolerance


def fit_order(lams: Sequence[float], errors: Sequence[float | None]) -> Order:
    """Return the least-squares line of log error over the longest interval of λ in which it is straight.

    The interval is chosen by its deviation from a line alone, not by the expected slope: at larger λ the next order
    contributes, at smaller λ round-off. Values of λ below that of the smallest error are ignored.
    """
    steps = sorted(((lam, error) for lam, error in zip(lams, errors, strict=True) if error is not None), reverse=True)
    if steps and all(error <= QUADRATIC for _, error in steps):
        return Order(None, (), "quadratic")
    steps = steps[: 1 + min(range(len(steps)), key=lambda i: steps[i][1], default=0)]
    x, y = (np.log([max(step[i], 1e-300) for step in steps]) for i in (0, 1))
    for length in range(len(steps), _MIN_STEPS - 1, -1):
        windows = [slice(start, start + length) for start in range(len(steps) - length + 1)]
        window = min(windows, key=lambda w: _deviation(x[w], y[w]))
        if _deviation(x[window], y[window]) <= _MAX_DEVIATION:
            slope, offset = np.polyfit(x[window], y[window], 1)
            return Order(float(slope), tuple(lam for lam, _ in steps[window]), "fitted", float(np.exp(offset)))
    return Order(None, (), f"fewer than {_MIN_STEPS} steps on a line between the nonlinear range and round-off")


def _deviation(x: Floats, y: Floats) -> float:
    """Return the largest distance from the least-squares line."""
    return float(np.abs(y - np.polyval(np.polyfit(x, y, 1), x)).max())
