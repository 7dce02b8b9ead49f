"""A report as one self-contained HTML page: styles and pictures inlined, everything escaped, no request.

One script, which sorts tables, is part of the page; the page's own policy names its digest, so that no other runs.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bdl_bench.metrics import Metric
from bdl_bench.report.formatting import count, duration, mebibytes, number, with_half_width
from bdl_bench.report.scores import ScoreCell
from bdl_bench.report.view import Report

__all__ = ["to_html"]

_MARKS = {"better": "▲", "worse": "▼"}
_ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def to_html(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("bdl_bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=duration, mebibytes=mebibytes, half=with_half_width, count=count)
    script = resources.files("bdl_bench.report").joinpath("templates/sort.js").read_text(encoding="utf-8")
    environment.globals.update(mark=_mark, arrow=_arrow, script=Markup(script), script_digest=_digest(script))
    return environment.get_template("report.html").render(report=report)


def _digest(script: str) -> str:
    """The source expression of a Content-Security-Policy that admits this script alone."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _mark(cell: ScoreCell) -> str:
    return _MARKS.get(cell.against or "", "")


def _arrow(metric: Metric) -> str:
    return _ARROWS[metric.better]
