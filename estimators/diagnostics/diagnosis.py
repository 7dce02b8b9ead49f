"""What a diagnosis is made of: findings, each with its number, and what every method would cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from estimators.diagnostics.findings import Cost, Finding
from estimators.diagnostics.table import cost_table, findings_table

__all__ = ["Diagnosis"]


@dataclass(frozen=True)
class Diagnosis:
    """Findings in the order in which they were made, and costs. `print` it; `diagnosis["spectrum"]` is one finding."""

    findings: tuple[Finding, ...]
    costs: tuple[Cost, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings of level "error"."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings of level "warning"."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def __getitem__(self, name: str) -> Finding:
        """The first finding of a name; KeyError names those there are."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"{name!r} is not among {', '.join(finding.name for finding in self.findings)}")

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        findings = [{**asdict(finding), "values": dict(finding.values)} for finding in self.findings]
        return {"findings": findings, "costs": [{**asdict(cost), "fits": cost.fits} for cost in self.costs]}

    def __str__(self) -> str:
        return "\n\n".join(part for part in (findings_table(self.findings), cost_table(self.costs)) if part)
