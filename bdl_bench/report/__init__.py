"""Reports of records: one self-contained HTML page, Markdown, CSV, Parquet, and figures as files."""

from __future__ import annotations

from pathlib import Path

from bdl_bench.report.csv_table import to_csv
from bdl_bench.report.figures.gallery import Gallery
from bdl_bench.report.html import to_html
from bdl_bench.report.latex import to_latex
from bdl_bench.report.markdown import to_markdown
from bdl_bench.report.selection import EVERYTHING, Selection
from bdl_bench.report.tidy import has_parquet, to_parquet
from bdl_bench.report.view import build
from estimators.errors import OptionError
from estimators.persistence.atomic import write_bytes, write_text

__all__ = ["Selection", "write_report"]


def write_report(
    directory: Path, *, figures: str | None = None, latex: bool = False, selection: Selection = EVERYTHING
) -> Path:
    """Render the records of a directory as report.html, report.md and report.csv in it.

    If pandas and pyarrow are installed (the extra `parquet`), also every number of every run as report.parquet.

    Args:
        directory: where `compare` wrote its records.
        figures: "svg" or "pdf" also saves every figure as `figures/<task>/<name>.<figures>`; None saves none.
        latex: whether to save the tables as `tables/<task>.tex`, `summary.tex`, and `tables.tex`, a document of all.
        selection: the tasks, methods and columns that the report shows.

    Returns:
        The path of report.html.

    Raises:
        OptionError: for a directory without readable records, for another value of `figures`, for selected names that
            no record has, and for a selection without names or without records.
    """
    if not any((directory / "records").rglob("*.json")):
        raise OptionError(
            "a directory that bdl-bench compare wrote",
            received=str(directory),
            remedy="check the path given to report.",
        )
    report = build(directory, Gallery(directory / "figures", figures), selection)
    page = directory / "report.html"
    write_text(page, to_html(report))
    write_text(directory / "report.md", to_markdown(report))
    write_text(directory / "report.csv", to_csv(report))
    for name, text in (to_latex(report) if latex else {}).items():
        write_text(directory / "tables" / name, text)
    if has_parquet():
        write_bytes(directory / "report.parquet", to_parquet(report.numbers))
    return page
