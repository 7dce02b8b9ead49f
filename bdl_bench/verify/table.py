"""Proofs as tables: rich on a terminal, Markdown and JSON on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from bdl_bench.verify.checks import Verification
from bdl_bench.verify.lambda_sweep import LambdaSweep
from estimators.persistence.atomic import write_text

__all__ = ["to_json", "to_markdown", "to_terminal", "verdict", "write_table"]

_HEADER = (
    "case",
    "curvature",
    "weights",
    "P",
    "relative gradient",
    "eigenvalues",
    "exact routes",
    "slope, forward",
    "slope, central",
    "error at 1e-4",
    "best rung",
    "verdict",
)
_LEGEND = """Errors are max |difference| / max |reference|, of the covariance at the queries, against a dense reference
that shares no code with the library. *Exact routes*: the worst of `LinearizedLaplace` (Cholesky, CG, and the dual form
for the GGN) and `RegVar(Pointwise(), LinearResponse())`; bound 1e-8. *Slopes*: of log error over log λ of
`RegVar(Pointwise(), NewtonRefit(λ, difference))`, fitted between the non-linear end and round-off; bounds 1 ± 0.1 and
2 ± 0.15; "quadratic": error at most 1e-9 at every λ. *Error at 1e-4* and *best rung*: of central differences; bounds
2e-4 and 1e-6. *Relative gradient*: ‖∇L‖/‖δθ̂‖ at θ̂, 0 where it is stationary."""


def write_table(proofs: Sequence[Verification], path: Path) -> None:
    """The Markdown page of the full suite, whole or not at all."""
    write_text(path, to_markdown(proofs, title="Verification: RegVar against the dense reference"))


def verdict(proof: Verification) -> str:
    """One or two words."""
    if proof.failures():
        return "fails"
    return "agrees" if proof.definite else "refused, as it must be"


def to_terminal(proofs: Sequence[Verification]) -> Group:
    """The tables of `proofs`, one line each, and the parts of the error where they were measured."""
    table = Table(*_HEADER, box=None, pad_edge=False)
    for proof in proofs:
        style = "red" if proof.failures() else ""
        table.add_row(*(escape(cell) for cell in _cells(proof)), style=style)
    parts: list[Group | Table | str] = [table]
    for proof in proofs:
        parts += [f"[red]{escape(proof.name)}: {escape(failure)}[/red]" for failure in proof.failures()]
        parts += [escape(f"{proof.name}: {note}") for note in proof.notes]
        if proof.links:
            parts += ["", _links_table(proof)]
    return Group(*parts)


def to_markdown(proofs: Sequence[Verification], *, title: str = "Verification") -> str:
    """The same as Markdown."""
    failed = sum(bool(proof.failures()) for proof in proofs)
    lines = [f"# {title}", "", f"{len(proofs)} cases, {failed} of them with a bound that does not hold.", "", _LEGEND]
    lines += ["", *_markdown_table(_HEADER, [_cells(proof) for proof in proofs])]
    for proof in proofs:
        lines += _details(proof)
    return "\n".join(lines) + "\n"


def to_json(proofs: Sequence[Verification]) -> str:
    """Every number."""
    content = []
    for proof in proofs:
        orders = {d: asdict(ladder.order) for d, ladder in proof.ladders.items()}
        content.append(asdict(proof) | {"orders": orders, "failures": proof.failures(), "verdict": verdict(proof)})
    return json.dumps({"proofs": content}, indent=1, ensure_ascii=False) + "\n"


def _details(proof: Verification) -> list[str]:
    lines = [f"- {text}" for text in (*proof.failures(), *proof.notes)]
    if proof.links:
        rows = [
            (link.name, link.change, _error(link.error), _ratio(link.mean_ratio), link.note) for link in proof.links
        ]
        lines += ["", "Where the error of posterior draws comes from:", ""]
        lines += _markdown_table(("part", "from → to", "error", "mean ratio", "note"), rows)
    return ["", f"## {proof.name}", "", *lines] if lines else []


def _links_table(proof: Verification) -> Group:
    title = f"{escape(proof.name)}: where the error of posterior draws comes from"
    table = Table("part", "from → to", "error", "mean ratio", title=title, box=None, title_justify="left")
    for link in proof.links:
        table.add_row(link.name, link.change, _error(link.error), _ratio(link.mean_ratio))
    notes = [f"{link.name}: {link.note}" for link in proof.links if link.note]
    return Group(table, *(escape(note) for note in notes))


def _cells(proof: Verification) -> tuple[str, ...]:
    forward, central = proof.ladders.get("forward"), proof.ladders.get("central")
    return (
        proof.name,
        proof.curvature,
        proof.subset,
        str(proof.n_parameters),
        f"{proof.relative_gradient:.1e}",
        f"{proof.spectrum[0]:.2g} … {proof.spectrum[1]:.2g}",
        _error(max(proof.exact.values(), default=None)),
        _slope(forward),
        _slope(central),
        _error(central.at(1e-4) if central is not None and 1e-4 in central.lams else None),
        _error(central.best if central is not None else None),
        verdict(proof),
    )


def _slope(ladder: LambdaSweep | None) -> str:
    if ladder is None:
        return "–"
    return ladder.order.note if ladder.order.slope is None else f"{ladder.order.slope:.3f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]
