"""Tables of a diagnosis on a console."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from estimators.diagnostics import Cost, Diagnosis, Finding
from estimators.runtime.units import in_bytes, in_seconds

__all__ = ["show"]


_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


def show(diagnosis: Diagnosis, console: Console) -> int:
    """Print a diagnosis and return the exit status, 1 if it has an error."""
    console.print(_findings(diagnosis.findings))
    if diagnosis.costs:
        console.print("", _costs(diagnosis.costs))
    return 1 if diagnosis.errors else 0


def _findings(findings: Collection[Finding]) -> Table:
    table = Table("level", "what", "measured", box=None, pad_edge=False)
    for finding in findings:
        colour = _COLOURS[finding.level]
        text = escape(finding.measured)
        if finding.level != "ok":
            advice = [finding.meaning, f"try: {finding.remedy}" if finding.remedy else ""]
            text += "".join(f"\n[dim]{escape(line)}[/dim]" for line in advice if line)
        table.add_row(f"[{colour}]{finding.level}[/{colour}]", escape(finding.name), text)
    return table


def _costs(costs: Collection[Cost]) -> Table:
    table = Table("what a fit would cost", "memory", "passes", "time", "fits", "", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for cost in costs:
        fits = "[green]yes[/green]" if cost.fits else f"[red]no[/red], {in_bytes(cost.bytes_available)} are free"
        numbers = (in_bytes(cost.bytes_needed), f"{cost.passes:.3g}", in_seconds(cost.seconds))
        table.add_row(escape(cost.estimator), *numbers, fits, escape(cost.afterwards))
    return table
