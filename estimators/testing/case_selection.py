"""Case selection: the kit's cases that an estimator accepts, so that a classification method is checked as well."""

from __future__ import annotations

from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import EstimatorUnderTest
from estimators.testing.outcomes import NotApplicable

__all__ = ["any_case", "first_case", "fitted_cases"]


def first_case(tested: EstimatorUnderTest, *names: str) -> Case:
    """Return the first of these cases that the estimator accepts, or the first one if it rejects all."""
    for name in names:
        try:
            tested.build(tested.cases[name])
        except NotApplicable:
            continue
        return tested.cases[name]
    return tested.cases[names[0]]


def any_case(tested: EstimatorUnderTest) -> Case:
    """Return a case for checks that any likelihood suits: regression, or classes if it is rejected."""
    return first_case(tested, "regression", "classification", "binary")


def fitted_cases(tested: EstimatorUnderTest, *names: str) -> list[Case]:
    """Return the cases that can be fitted. Raises NotApplicable if none can."""
    found, reasons = [], []
    for name in names:
        try:
            tested.fitted(tested.cases[name])
        except NotApplicable as reason:
            reasons.append(reason)
        else:
            found.append(tested.cases[name])
    if not found:
        raise reasons[-1]
    return found
