"""The registry of checks: functions by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from estimators.testing.estimator_under_test import EstimatorUnderTest

__all__ = ["CHECKS", "Check", "check"]

Check = Callable[[EstimatorUnderTest], None]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Return a decorator that registers a check.

    The decorated function returns if the property holds. Else it raises `CheckFailure`, or `NotApplicable`.

    Args:
        name: the name of the check in reports.

    Returns:
        The decorator, which returns the function unchanged.
    """

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register
