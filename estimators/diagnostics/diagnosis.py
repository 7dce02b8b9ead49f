"""What a diagnosis is made of: findings, each with its number, and what every method would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from estimators.diagnostics.table import cost_table, findings_table

__all__ = ["Cost", "Diagnosis", "Finding", "Level"]

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    name: which. level: "ok", "note" (worth knowing), "warning" (a number will mislead), "error" (a fit would raise, or
    be of something else). measured: the numbers in words. meaning: what follows. remedy: what to try.
    values: the numbers, in JSON types.
    """

    name: str
    level: Level
    measured: str
    meaning: str = ""
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a fit of one method would take here: an estimate, made before.

    estimator: how it is constructed. bytes_needed, bytes_available: at its peak, beside the model and the data.
    passes: forward and backward over the training rows. seconds: of the fit, one process. afterwards: what queries
    cost, where that is more than a few passes.
    """

    estimator: str
    bytes_needed: int
    bytes_available: int
    passes: float
    seconds: float
    afterwards: str = ""

    @property
    def fits(self) -> bool:
        """Whether it fits into the free memory."""
        return self.bytes_needed <= self.bytes_available


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
