"""The checks by name, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Callable

from estimators.testing.estimator_under_test import EstimatorUnderTest

__all__ = ["CHECKS", "Check", "check"]

Check = Callable[[EstimatorUnderTest], None]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check: it returns where the property holds, and raises Mismatch or NotApplicable."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register
