"""Records rendered: one self-contained HTML page, Markdown and CSV."""

from __future__ import annotations

from pathlib import Path

from bdl_bench.report.csv_table import to_csv
from bdl_bench.report.html import to_html
from bdl_bench.report.markdown import to_markdown
from bdl_bench.report.view import build
from estimators.atomic import write_text
from estimators.errors import OptionError

__all__ = ["write_report"]


def write_report(directory: Path) -> Path:
    """Render every record of `directory` into report.html, report.md and report.csv there; the path of the first."""
    if not any((directory / "records").rglob("*.json")):
        raise OptionError(
            "a directory that bdl-bench compare wrote",
            received=str(directory),
            remedy="check the path given to report.",
        )
    report = build(directory)
    page = directory / "report.html"
    write_text(page, to_html(report))
    write_text(directory / "report.md", to_markdown(report))
    write_text(directory / "report.csv", to_csv(report))
    return page
