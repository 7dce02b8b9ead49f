"""Tables of verifications: rich on a terminal, Markdown and JSON on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from bdl_bench.markdown import markdown_table
from bdl_bench.verify.lambda_sweep import LambdaSweep
from bdl_bench.verify.verification import Verification

__all__ = ["to_json", "to_markdown", "to_terminal", "verdict"]

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
    "best step",
    "verdict",
)
_LEGEND = """Errors are max |difference| / max |reference|, of the covariance at the queries, against a dense reference
that shares no code with the library. *Exact routes*: the worst of `LinearizedLaplace` (Cholesky, CG, and the dual form
for the GGN) and `RegVar(Pointwise(), LinearResponse())`; bound 1e-8. *Slopes*: of log error over log λ of
`RegVar(Pointwise(), NewtonRefit(λ, difference))`, fitted between the nonlinear range and round-off; bounds 1 ± 0.1 and
2 ± 0.15; "quadratic": error at most 1e-9 at every λ. *Error at 1e-4* and *best step*: of central differences; bounds
2e-4 and 1e-6. *Relative gradient*: ‖∇L‖/‖δθ̂‖ at θ̂, 0 if it is stationary."""


def verdict(verification: Verification) -> str:
    """Return "agrees", "fails", or that A is indefinite and every route raised."""
    if verification.failures():
        return "fails"
    return "agrees" if verification.definite else "indefinite, as reported"


def to_terminal(verifications: Sequence[Verification]) -> Group:
    """Return a table with one line per verification, its failures and notes, and the parts of the error."""
    table = Table(*_HEADER, box=None, pad_edge=False)
    for verification in verifications:
        style = "red" if verification.failures() else ""
        table.add_row(*(escape(entry) for entry in _row(verification)), style=style)
    parts: list[Group | Table | str] = [table]
    for verification in verifications:
        parts += [f"[red]{escape(verification.name)}: {escape(failure)}[/red]" for failure in verification.failures()]
        parts += [escape(f"{verification.name}: {note}") for note in verification.notes]
        if verification.error_parts:
            parts += ["", _parts_table(verification)]
    return Group(*parts)


def to_markdown(verifications: Sequence[Verification], *, title: str = "Verification") -> str:
    """Return the verifications as a Markdown page."""
    failed = sum(bool(verification.failures()) for verification in verifications)
    lines = [
        f"# {title}",
        "",
        f"{len(verifications)} cases, {failed} of them with an error above its bound.",
        "",
        _LEGEND,
    ]
    lines += ["", *_markdown_table(_HEADER, [_row(verification) for verification in verifications])]
    for verification in verifications:
        lines += _details(verification)
    return "\n".join(lines) + "\n"


def to_json(verifications: Sequence[Verification]) -> str:
    """Return every number as JSON."""
    content = []
    for verification in verifications:
        orders = {d: asdict(sweep.order) for d, sweep in verification.sweeps.items()}
        content.append(
            asdict(verification)
            | {"orders": orders, "failures": verification.failures(), "verdict": verdict(verification)}
        )
    return json.dumps({"verifications": content}, indent=1, ensure_ascii=False) + "\n"


def _details(verification: Verification) -> list[str]:
    lines = [f"- {text}" for text in (*verification.failures(), *verification.notes)]
    if verification.error_parts:
        rows = [
            (part.name, part.change, _error(part.error), _ratio(part.mean_ratio), part.note)
            for part in verification.error_parts
        ]
        lines += ["", "Parts of the error of posterior draws:", ""]
        lines += _markdown_table(("part", "from → to", "error", "mean ratio", "note"), rows)
    return ["", f"## {verification.name}", "", *lines] if lines else []


def _parts_table(verification: Verification) -> Group:
    title = f"{escape(verification.name)}: parts of the error of posterior draws"
    table = Table("part", "from → to", "error", "mean ratio", title=title, box=None, title_justify="left")
    for part in verification.error_parts:
        table.add_row(part.name, part.change, _error(part.error), _ratio(part.mean_ratio))
    notes = [f"{part.name}: {part.note}" for part in verification.error_parts if part.note]
    return Group(table, *(escape(note) for note in notes))


def _row(verification: Verification) -> tuple[str, ...]:
    forward, central = verification.sweeps.get("forward"), verification.sweeps.get("central")
    return (
        verification.name,
        verification.curvature,
        verification.subset,
        str(verification.n_parameters),
        f"{verification.relative_gradient:.1e}",
        f"{verification.spectrum[0]:.2g} … {verification.spectrum[1]:.2g}",
        _error(max(verification.exact.values(), default=None)),
        _slope(forward),
        _slope(central),
        _error(central.at(1e-4) if central is not None and 1e-4 in central.lams else None),
        _error(central.best if central is not None else None),
        verdict(verification),
    )


def _slope(sweep: LambdaSweep | None) -> str:
    if sweep is None:
        return "–"
    return sweep.order.note if sweep.order.slope is None else f"{sweep.order.slope:.3f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = ([entry.replace("|", "\\|").replace("*", "\\*") for entry in row] for row in rows)
    return markdown_table(header, escaped)
