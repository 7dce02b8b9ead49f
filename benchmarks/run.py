"""Measure rows, record each, and render their pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path

from benchmarks.pages import PAGES
from benchmarks.records import read, write
from estimators.errors import OptionError
from estimators.persistence.atomic import write_text

__all__ = ["run_bench"]

Listener = Callable[[str], None]


def run_bench(selected: Sequence[str], out: Path, listener: Listener = print) -> list[Path]:
    """Measure rows or pages and return the paths of the pages.

    Records are kept in OUT/records, so that a page shows all rows that were measured in this directory. A row whose
    process is killed is reported to the listener and not recorded.

    Args:
        selected: names of rows or pages; empty: the default pages.
        out: directory of records and pages.
        listener: called with one line of text per row.

    Returns:
        The paths of the rendered pages.

    Raises:
        OptionError: for a name that is neither a row nor a page.
    """
    chosen = _selected(selected)
    for page, row in chosen:
        listener(f"{page}: {row}")
        try:
            measured = PAGES[page].rows[row]()
        except BrokenExecutor:  # its process was killed; the other rows can still be measured
            listener(f"{page}: {row} was killed, for example for lack of memory; not recorded")
            continue
        write(out, page, row, measured)
        _write_page(page, out)
    return [out / f"{page}.md" for page in dict.fromkeys(page for page, _ in chosen)]


def _write_page(name: str, out: Path) -> None:
    page = PAGES[name]
    write_text(out / f"{name}.md", page.to_markdown(read(out, name, list(page.rows))))


def _selected(selected: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (page, row) pairs of the names."""
    every = [(page, row) for page, found in PAGES.items() for row in found.rows]
    if not selected:
        return [(page, row) for page, row in every if PAGES[page].default]
    unknown = [name for name in selected if name not in PAGES and name not in {row for _, row in every}]
    if unknown:
        raise OptionError(
            f"a page among {', '.join(PAGES)}, or a row among {', '.join(row for _, row in every)}",
            received=", ".join(unknown),
            remedy="leave --select out to measure all but the large networks.",
        )
    return [(page, row) for page, row in every if page in selected or row in selected]
