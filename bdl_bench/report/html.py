"""A report as one self-contained HTML page: inlined styles and pictures, everything escaped, no script, no request."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from bdl_bench.metrics import Metric
from bdl_bench.report.scores import ScoreCell
from bdl_bench.report.text import duration, mebibytes, number, with_half_width
from bdl_bench.report.view import Report

__all__ = ["to_html"]

_MARKS = {"better": "▲", "worse": "▼"}
_ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def to_html(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("bdl_bench.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(number=number, duration=duration, mebibytes=mebibytes, half=with_half_width)
    environment.globals.update(mark=_mark, arrow=_arrow)
    return environment.get_template("report.html").render(report=report)


def _mark(cell: ScoreCell) -> str:
    return _MARKS.get(cell.against or "", "")


def _arrow(metric: Metric) -> str:
    return _ARROWS[metric.better]
