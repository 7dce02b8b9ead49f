"""What a check finds: that it holds, that it does not and why, or that it does not apply."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckFailure", "ConformanceError", "NotApplicable", "Outcome", "Report"]


class CheckFailure(AssertionError):
    """A property that does not hold: what was expected, what was received, the likely fault."""

    def __init__(self, expected: str, *, received: str, fault: str) -> None:
        self.expected, self.received, self.fault = expected, received, fault
        super().__init__(f"Expected {expected}. Received {received}. Likely fault: {fault}")


class NotApplicable(Exception):
    """A property that the estimator does not claim, or a model that it refuses."""


@dataclass(frozen=True)
class Outcome:
    """Of one check: "passed", "failed" or "skipped", and why."""

    check: str
    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8}{self.check}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks, in their order."""

    estimator: str
    outcomes: tuple[Outcome, ...]

    def _named(self, status: str) -> dict[str, str]:
        return {outcome.check: outcome.reason for outcome in self.outcomes if outcome.status == status}

    @property
    def failed(self) -> dict[str, str]:
        """Reasons by check."""
        return self._named("failed")

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons by check."""
        return self._named("skipped")

    @property
    def passed(self) -> list[str]:
        """The checks that hold."""
        return list(self._named("passed"))

    def __str__(self) -> str:
        return "\n".join([f"{self.estimator}: {len(self.passed)} checks hold", *map(str, self.outcomes)])


class ConformanceError(AssertionError):
    """Some checks do not hold; `report` has all of them."""

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [f"  {name}: {reason}" for name, reason in report.failed.items()]
        super().__init__("\n".join([f"{report.estimator} does not conform in {len(lines)} checks:", *lines]))
