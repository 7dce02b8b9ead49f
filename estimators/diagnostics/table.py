"""A diagnosis as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from estimators.runtime.units import in_bytes, in_seconds

if TYPE_CHECKING:
    from estimators.diagnostics.findings import Cost, Finding

__all__ = ["cost_table", "findings_table"]

_WIDTH = 110


def findings_table(findings: Sequence[Finding]) -> str:
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


def cost_table(costs: Sequence[Cost]) -> str:
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
