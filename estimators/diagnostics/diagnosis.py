"""The result of `diagnose`: findings with their numbers, and the cost of every method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from estimators.diagnostics.findings import Cost, Finding
from estimators.diagnostics.table import cost_table, findings_table

__all__ = ["Diagnosis"]


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
        return "\n\n".join(part for part in (findings_table(self.findings), cost_table(self.costs)) if part)
