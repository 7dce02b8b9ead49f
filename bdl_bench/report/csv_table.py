"""A report as CSV: one line per number of each table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from bdl_bench.report.reference_agreement import CostRow
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.summary import TaskView
from bdl_bench.report.view import Report
from bdl_bench.stats import Interval, mean_interval

__all__ = ["to_csv"]

_HEADER = (
    "task",
    "method",
    "variant",
    "quantity",
    "mean",
    "low95",
    "high95",
    "seeds",
    "against_map",
    "not_worse_than_best",
)
Row = tuple[object, ...]


def to_csv(report: Report) -> str:
    """Return the text with a header line. Names that a spreadsheet would run as a formula get a leading apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_HEADER)
    for row in _rows(report):
        is_formula = [isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") for value in row]
        writer.writerow([f"'{value}" if runs else value for value, runs in zip(row, is_formula, strict=True)])
    return buffer.getvalue()


def _rows(report: Report) -> Iterator[Row]:
    for task in report.tasks:
        for table in task.scores.tables:
            yield from _scores(task.name, table)
        yield from _agreement(task)
        yield from _fidelity(task)
        for cost in task.costs.rows:
            yield from _costs(task.name, cost)
    yield from _shifted(report)
    if report.summary is not None and report.summary.ranking is not None:
        for method, rank in report.summary.ranking.average.items():
            yield ("", method, "", "average rank", rank, "", "", "", "", "")


def _scores(task: str, table: ScoreTable) -> Iterator[Row]:
    for method, entries in table.entries.items():
        for key, entry in entries.items():
            comparison = entry.against_baseline or "", int(entry.not_worse_than_best)
            yield (task, method, table.variant, key, *_numbers(entry.interval), *comparison)


def _agreement(task: TaskView) -> Iterator[Row]:
    for row in task.agreement.rows:
        found = {"spearman": row.spearman, "mean_ratio": row.mean_ratio, "relative_rmse": row.relative_rmse}
        for name, interval in found.items():
            if interval is not None:
                yield (task.name, row.method, "untuned", f"agreement/{name}", *_numbers(interval), "", "")


def _fidelity(task: TaskView) -> Iterator[Row]:
    for found in task.fidelity.sets if task.fidelity is not None else []:
        for name, floor in found.floor.items():
            if floor is not None:
                yield (task.name, "", "noise floor", f"fidelity/{found.key}/{name}", floor, "", "", "", "", "")
        for table in found.tables:
            variant = "tuned" if table.tuned else "untuned"
            for row in table.rows:
                for name, interval in row.intervals.items():
                    if interval is not None:
                        key = f"fidelity/{found.key}/{name}"
                        yield (task.name, row.method, variant, key, *_numbers(interval), "", "")


def _costs(task: str, cost: CostRow) -> Iterator[Row]:
    medians = {
        "fit_seconds": cost.fit_seconds,
        "tuning_seconds": cost.tuning_seconds,
        "predict_seconds": cost.predict_seconds,
        "passes": cost.passes,
        "peak_bytes": cost.peak_bytes,
        "peak_increase_bytes": cost.increase_bytes,
    }
    for name, value in medians.items():
        if value is not None:
            yield (task, cost.method, "", f"cost/{name} (median)", value, "", "", "", "", "")


def _shifted(report: Report) -> Iterator[Row]:
    """Yield the metrics of shifted rows, over distinct seeds."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    designs = {task.name: task.design for task in report.tasks}
    for row in report.numbers:
        first = designs[row.task].copies[row.method][row.seed]
        if row.quantity.startswith("shift/") and first == row.seed:
            found.setdefault((row.task, row.method, row.variant, row.quantity), []).append(row.value)
    for name, values in found.items():
        yield (*name, *_numbers(mean_interval(values)), "", "")


def _numbers(interval: Interval) -> Row:
    return interval.mean, *("" if end is None else end for end in (interval.low, interval.high)), interval.n
