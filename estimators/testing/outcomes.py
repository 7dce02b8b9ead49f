"""The outcomes of checks: passed, failed with a reason, or skipped with a reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckFailure", "ConformanceError", "NotApplicable", "Outcome", "Report"]


class CheckFailure(AssertionError):
    """A check raises this if its property does not hold.

    Args:
        expected: what was expected, in words.
        received: what was received, in words.
        fault: the likely fault of the estimator.

    Example:
        >>> raise CheckFailure("variances >= 0", received="-0.1", fault="a transposition.")
        Traceback (most recent call last):
        ...
        estimators.testing.outcomes.CheckFailure: Expected variances >= 0. Received -0.1. Likely fault: a transposition.
    """

    def __init__(self, expected: str, *, received: str, fault: str) -> None:
        self.expected, self.received, self.fault = expected, received, fault
        super().__init__(f"Expected {expected}. Received {received}. Likely fault: {fault}")


class NotApplicable(Exception):
    """A check raises this if the estimator does not declare a capability, or rejects the model."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check.

    Attributes:
        check: the name of the check.
        status: "passed", "failed" or "skipped".
        reason: why it failed or was skipped.
    """

    check: str
    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8}{self.check}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of one estimator, as `check_estimator` returns them.

    Attributes:
        estimator: the name of the estimator.
        outcomes: one outcome per check, in the order of the checks.
    """

    estimator: str
    outcomes: tuple[Outcome, ...]

    def _named(self, status: str) -> dict[str, str]:
        return {outcome.check: outcome.reason for outcome in self.outcomes if outcome.status == status}

    @property
    def failed(self) -> dict[str, str]:
        """The reasons of failures by the names of checks."""
        return self._named("failed")

    @property
    def skipped(self) -> dict[str, str]:
        """The reasons of skipped checks by their names."""
        return self._named("skipped")

    @property
    def passed(self) -> list[str]:
        """The names of the checks that passed."""
        return list(self._named("passed"))

    def __str__(self) -> str:
        return "\n".join([f"{self.estimator}: {len(self.passed)} checks passed", *map(str, self.outcomes)])


class ConformanceError(AssertionError):
    """Some checks failed.

    Attributes:
        report: the outcomes of all checks.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [f"  {name}: {reason}" for name, reason in report.failed.items()]
        super().__init__("\n".join([f"{report.estimator} does not conform in {len(lines)} checks:", *lines]))
