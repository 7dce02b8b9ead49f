"""The λ sweep: errors of RegVar's refits at decreasing λ against the reference of their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bdl_bench.verify.orders import Order, fit_order
from estimators import NewtonRefit, Pointwise, RegVar
from estimators.errors import ConvergenceError, LambdaTooLargeError

__all__ = ["LAMS", "LambdaSweep", "relative_error", "run_sweep"]

LAMS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
"""From λ at which refits are clearly nonlinear to λ at which round-off dominates."""


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
