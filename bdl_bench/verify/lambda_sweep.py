"""The λ ladder: RegVar's refits at falling λ against the reference of their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bdl_bench.verify.orders import Order, fit_order
from estimators import NewtonRefit, Pointwise, RegVar
from estimators.errors import ConvergenceError, LambdaTooLargeError

__all__ = ["LAMS", "LambdaSweep", "relative_error", "run_sweep"]

LAMS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)


@dataclass(frozen=True)
class LambdaSweep:
    """Errors (max difference over max value) at each λ; None where the refit was refused, `refusals` saying why."""

    difference: str
    lams: tuple[float, ...]
    errors: tuple[float | None, ...]
    refusals: tuple[str | None, ...]

    @property
    def order(self) -> Order:
        """The fitted order of convergence."""
        return fit_order(self.lams, self.errors)

    @property
    def best(self) -> float:
        """The least error of the ladder."""
        return min((error for error in self.errors if error is not None), default=float("inf"))

    def at(self, lam: float) -> float | None:
        """The error at one rung."""
        return self.errors[self.lams.index(lam)]


def run_sweep(
    fitted: RegVar, x: object, exact: Tensor, *, difference: str, lams: Sequence[float] = LAMS
) -> LambdaSweep:
    """Pointwise Newton refits of a fitted RegVar at each λ, against the exact covariance (M, C, C) at x.

    `fitted` needs Pointwise(), which solves at query: only its solver changes from rung to rung.
    """
    assert isinstance(fitted.regularizer, Pointwise)
    errors: list[float | None] = []
    refusals: list[str | None] = []
    before = fitted.solver
    try:
        for lam in lams:
            fitted.solver = NewtonRefit(lam, difference)
            try:
                errors.append(relative_error(fitted.covariance(x), exact))
                refusals.append(None)
            except (LambdaTooLargeError, ConvergenceError) as error:
                errors.append(None)
                refusals.append(type(error).__name__)
    finally:
        fitted.solver = before
    return LambdaSweep(difference, tuple(lams), tuple(errors), tuple(refusals))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """max |found − exact| / max |exact|."""
    return float((found - exact).abs().max() / exact.abs().max())
