"""The result of a comparison in Python: its records, a data frame of all numbers, and its report."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bdl_bench.records.record import Record, RecordStore
from bdl_bench.report.results import group_by_task, load_records
from bdl_bench.report.tidy import long_rows, to_frame
from estimators.errors import StateError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison"]


class Comparison:
    """The records that `bdl-bench compare` wrote into a directory.

    A notebook shows the report in a sandboxed frame, in which the script of the page, which sorts tables, has no access
    to the notebook.

    Args:
        directory: where the records are.
        tasks: names of the tasks whose records are read; None: of all tasks in the directory.

    Example:
        >>> comparison = Comparison("bdl-results/empty")
        >>> comparison.records
        []
    """

    def __init__(self, directory: str | Path, tasks: Collection[str] | None = None) -> None:
        self.directory = Path(directory)
        found = load_records(RecordStore(self.directory))
        self.records: list[Record] = [record for record in found if tasks is None or record.task in tasks]
        """By task, method and seed, as read by the constructor; a later run does not change them."""

    @cached_property
    def report(self) -> Path:
        """The path of report.html, which is rendered if it does not exist."""
        from bdl_bench.report import write_report

        page = self.directory / "report.html"
        return page if page.is_file() else write_report(self.directory)

    def to_frame(self) -> pd.DataFrame:
        """Return all numbers in long format. Needs the extra `notebook`.

        Returns:
            One row per number, with columns task, method, seed, variant, quantity, value.

        Raises:
            StateError: if a later run into the directory replaced the arrays of a record.
            UnsupportedError: if pandas is not installed.
        """
        store = RecordStore(self.directory)
        replaced = [r for r in self.records if r.status == "ok" and not store.arrays_are_complete(r)]
        if replaced:
            raise StateError(
                "the arrays that were written with these records",
                received=f"other arrays for {', '.join(f'{r.task} {r.method} seed {r.seed}' for r in replaced)}",
                remedy="read the new records with Comparison(directory), or use one directory per comparison.",
            )
        return to_frame([row for results in group_by_task(store, self.records) for row in long_rows(results)])

    def __repr__(self) -> str:
        counts = {status: sum(r.status == status for r in self.records) for status in ("ok", "skipped", "failed")}
        totals = ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "no records"
        return f"Comparison({str(self.directory)!r}: {totals})"

    def _repr_html_(self) -> str:
        page = escape(self.report.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Comparison of predictive uncertainty" '
            'style="width:100%;height:80vh;border:1px solid #ccc"></iframe>'
        )
