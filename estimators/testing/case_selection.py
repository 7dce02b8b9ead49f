"""Which of the kit's cases an estimator takes: a check asks on those, so that one of classes alone is asked as much."""

from __future__ import annotations

from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import EstimatorUnderTest
from estimators.testing.outcomes import NotApplicable

__all__ = ["any_case", "first_case", "fitted_cases"]


def first_case(subject: EstimatorUnderTest, *names: str) -> Case:
    """The first of these whose likelihood is not refused; the first of all where each is."""
    for name in names:
        try:
            subject.build(subject.cases[name])
        except NotApplicable:
            continue
        return subject.cases[name]
    return subject.cases[names[0]]


def any_case(subject: EstimatorUnderTest) -> Case:
    """For questions that each case would do for: regression, or classes where that is refused."""
    return first_case(subject, "regression", "classification", "binary")


def fitted_cases(subject: EstimatorUnderTest, *names: str) -> list[Case]:
    """Those of these that can be fitted; NotApplicable where none can."""
    found, reasons = [], []
    for name in names:
        try:
            subject.fitted(subject.cases[name])
        except NotApplicable as reason:
            reasons.append(reason)
        else:
            found.append(subject.cases[name])
    if not found:
        raise reasons[-1]
    return found
