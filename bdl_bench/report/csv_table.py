"""A report as CSV: one row for each number of each cell, for other tools to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from bdl_bench.report.view import Report
from bdl_bench.stats import Interval

__all__ = ["to_csv"]

_HEADER = ("task", "method", "quantity", "mean", "low95", "high95", "seeds", "against_map", "best_group")
Row = tuple[object, ...]


def to_csv(report: Report) -> str:
    """The text, with a header line; names that a spreadsheet would run as a formula get a leading apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_HEADER)
    for row in _rows(report):
        writer.writerow([_inert(value) if isinstance(value, str) else value for value in row])
    return buffer.getvalue()


def _rows(report: Report) -> Iterator[Row]:
    for task in report.tasks:
        for method, cells in task.scores.cells.items():
            for key, cell in cells.items():
                yield (task.name, method, key, *_numbers(cell.interval), cell.against or "", int(cell.in_best_group))
        for row in task.agreements:
            found = {"spearman": row.spearman, "mean_ratio": row.mean_ratio, "relative_rmse": row.relative_rmse}
            for name, interval in found.items():
                if interval is not None:
                    yield (task.name, row.method, f"agreement/{name}", *_numbers(interval), "", "")
        for cost in task.costs:
            medians = {"fit_seconds": cost.fit_seconds, "predict_seconds": cost.predict_seconds,
                       "peak_bytes": cost.peak_bytes, "peak_rise_bytes": cost.rise_bytes}  # fmt: skip
            for name, value in medians.items():
                yield (task.name, cost.method, f"cost/{name} (median)", value, "", "", "", "", "")


def _numbers(interval: Interval) -> Row:
    return interval.mean, *("" if end is None else end for end in (interval.low, interval.high)), interval.n


def _inert(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
