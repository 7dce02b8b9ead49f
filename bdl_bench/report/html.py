"""A report as one self-contained HTML page: styles and figures are inlined, all text is escaped, nothing is loaded.

The page has one script, which sorts tables and opens folded parts before printing. Its Content-Security-Policy has the
digest of this script, so that no other script runs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bdl_bench.citation import bibtex
from bdl_bench.records.record import Record
from bdl_bench.report.formatting import count, effect, mean_and_half_width, number
from bdl_bench.report.view import Report
from estimators.runtime.units import in_bytes, in_seconds

__all__ = ["by_reason", "columns", "to_html"]

_MARKS = {"better": "▲", "worse": "▼"}
_ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def to_html(report: Report) -> str:
    """Return the text of the page."""
    environment = Environment(
        loader=PackageLoader("bdl_bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, in_seconds=in_seconds, in_bytes=in_bytes, half=mean_and_half_width, count=count, effect=effect
    )
    script = resources.files("bdl_bench.report").joinpath("templates/sort.js").read_text(encoding="utf-8")
    environment.globals.update(
        mark=lambda verdict: _MARKS.get(verdict, ""),
        columns=columns,
        by_reason=by_reason,
        citation=bibtex().strip(),
        arrow=lambda metric: _ARROWS[metric.better],
        script=Markup(script),
        script_digest=_digest(script),
    )
    return environment.get_template("report.html").render(report=report)


def columns(n: int, kind: str) -> int:
    """Return the number of columns of a grid of figures whose last row is as full as possible.

    Args:
        n: number of figures.
        kind: "small" (5, 4 or 6 columns), "middle" (4 or 3) or "broad" (3 or 2); any other kind has one column.

    Returns:
        The number of columns: the first of those of the kind with the fullest last row; with fewer figures than
        columns, as many as figures, and at least 2 (4 of the kind "small").
    """
    choices = {"small": (5, 4, 6), "middle": (4, 3), "broad": (3, 2)}.get(kind, (1,))
    if n <= min(choices):
        return max(n, 2) if kind != "small" else max(n, 4)
    return min(choices, key=lambda c: -n % c)


def by_reason(records: Sequence[Record]) -> list[tuple[Record, list[int]]]:
    """Return the first record of each task, method and reason, with the seeds that share them."""
    found: dict[tuple[str, str, str | None], tuple[Record, list[int]]] = {}
    for record in records:
        found.setdefault((record.task, record.method, record.reason), (record, []))[1].append(record.seed)
    return list(found.values())


def _digest(script: str) -> str:
    """Return the source expression of a Content-Security-Policy that admits this script alone."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
