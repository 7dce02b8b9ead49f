"""A comparison in Python: its records, a data frame of all numbers, and its report in the cell of a notebook."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bdl_bench.records.record import Record, RecordStore
from bdl_bench.report.frame import to_frame
from bdl_bench.report.results import gather, readable
from bdl_bench.report.tidy import long_rows
from estimators.errors import StateError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison"]


class Comparison:
    """What `bdl-bench compare` wrote into a directory.

    In a notebook it shows its report in a frame of its own: the script of the page, which sorts tables, runs there
    without the rights of the notebook.

    Args:
        directory: where it was written.
        tasks: the names of the tasks whose records it has; None: all in the directory.
    """

    def __init__(self, directory: str | Path, tasks: Collection[str] | None = None) -> None:
        self.directory = Path(directory)
        found = readable(RecordStore(self.directory))
        self.records: list[Record] = [record for record in found if tasks is None or record.task in tasks]
        """By task, method and seed, as they were when this was made; a later run does not change them."""

    @cached_property
    def report(self) -> Path:
        """The path of report.html, which is rendered where it is not there yet."""
        from bdl_bench.report import write_report

        page = self.directory / "report.html"
        return page if page.is_file() else write_report(self.directory)

    def to_frame(self) -> pd.DataFrame:
        """All numbers in long format: task, method, seed, variant, quantity, value. Needs the extra `notebook`.

        Raises:
            StateError: if the arrays of a record were replaced since, by a later run into the directory.
        """
        store = RecordStore(self.directory)
        replaced = [r for r in self.records if r.status == "ok" and not store.arrays_are_complete(r)]
        if replaced:
            raise StateError(
                "the arrays that were written with these records",
                received=f"others for {', '.join(f'{r.task} {r.method} seed {r.seed}' for r in replaced)}",
                remedy="Comparison(directory) for what is there now; a directory of its own for each comparison.",
            )
        return to_frame([row for results in gather(store, self.records) for row in long_rows(results)])

    def __repr__(self) -> str:
        counts = {status: sum(r.status == status for r in self.records) for status in ("ok", "skipped", "failed")}
        cells = ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "no records"
        return f"Comparison({str(self.directory)!r}: {cells})"

    def _repr_html_(self) -> str:
        page = escape(self.report.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Comparison of predictive uncertainty" '
            'style="width:100%;height:80vh;border:1px solid #ccc"></iframe>'
        )
