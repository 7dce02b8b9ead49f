"""The result of `diagnose`: findings with their numbers, and the cost of every method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from estimators.diagnostics.findings import Cost, Finding
from estimators.runtime.units import in_bytes, in_seconds

__all__ = ["Diagnosis"]

_WIDTH = 110
"""Characters per line of a printed diagnosis."""


@dataclass(frozen=True)
class Diagnosis:
    """The findings and costs that `diagnose` returns. `print` shows them; `diagnosis["gradient"]` is one finding.

    Attributes:
        findings: the findings in the order of the checks.
        costs: the estimated cost of every method.
    """

    findings: tuple[Finding, ...]
    costs: tuple[Cost, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of level "error"."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings of level "warning"."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def __getitem__(self, name: str) -> Finding:
        """Return the first finding with a name. Raises KeyError, which lists the names, if there is none."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"{name!r} is not among {', '.join(finding.name for finding in self.findings)}")

    def to_dict(self) -> dict[str, Any]:
        """Return all findings and costs in JSON types."""
        findings = [{**asdict(finding), "values": dict(finding.values)} for finding in self.findings]
        return {"findings": findings, "costs": [{**asdict(cost), "fits": cost.fits} for cost in self.costs]}

    def __str__(self) -> str:
        return "\n\n".join(part for part in (_findings_table(self.findings), _cost_table(self.costs)) if part)


def _findings_table(findings: Sequence[Finding]) -> str:
    """Return one line per finding, followed by its meaning and remedy unless the finding is ok."""
    if not findings:
        return ""
    column = max(len(finding.name) for finding in findings) + 2
    return "\n".join(line for finding in findings for line in _lines(finding, column))


def _lines(finding: Finding, column: int) -> list[str]:
    margin = 9 + column
    lines = textwrap.wrap(finding.measured, _WIDTH - margin) or [""]
    if finding.level != "ok":
        lines += textwrap.wrap(finding.meaning, _WIDTH - margin)
        remedy = f"try: {finding.remedy}" if finding.remedy else ""
        lines += textwrap.wrap(remedy, _WIDTH - margin, subsequent_indent="     ")
    first = f"{finding.level:<9}{finding.name:<{column}}"
    return [first + lines[0], *(" " * margin + line for line in lines[1:])]


def _cost_table(costs: Sequence[Cost]) -> str:
    """Return one line per method."""
    if not costs:
        return ""
    column = max(len(cost.estimator) for cost in costs) + 2
    header = f"{'cost of a fit':<{column}}{'memory':>11}{'passes':>10}{'time':>10}  fits"
    rows = [
        f"{cost.estimator:<{column}}{in_bytes(cost.bytes_needed):>11}{cost.passes:>10.3g}"
        f"{in_seconds(cost.seconds):>10}  {'yes' if cost.fits else 'no':<5}{cost.afterwards}".rstrip()
        for cost in costs
    ]
    return "\n".join([header, *rows, f"of {in_bytes(costs[0].bytes_available)} free memory"])
