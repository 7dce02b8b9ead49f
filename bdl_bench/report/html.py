"""A report as one self-contained HTML page: styles and figures are inlined, all text is escaped, nothing is loaded.

The page has one script, which sorts tables. Its Content-Security-Policy has the digest of this script, so that no other
script runs.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bdl_bench.report.formatting import count, mean_and_half_width, number
from bdl_bench.report.view import Report
from estimators.runtime.units import in_bytes, in_seconds

__all__ = ["to_html"]

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
        number=number, in_seconds=in_seconds, in_bytes=in_bytes, half=mean_and_half_width, count=count
    )
    script = resources.files("bdl_bench.report").joinpath("templates/sort.js").read_text(encoding="utf-8")
    environment.globals.update(
        mark=lambda entry: _MARKS.get(entry.against_baseline, ""),
        arrow=lambda metric: _ARROWS[metric.better],
        script=Markup(script),
        script_digest=_digest(script),
    )
    return environment.get_template("report.html").render(report=report)


def _digest(script: str) -> str:
    """Return the source expression of a Content-Security-Policy that admits this script alone."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
