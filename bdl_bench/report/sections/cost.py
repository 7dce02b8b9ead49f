"""Time and memory, and the trade-off between accuracy and cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.pareto import MethodPoint, pareto
from bdl_bench.report.figures.times import times
from bdl_bench.report.reference_agreement import CostRow, cost_rows
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.sections.context import Context

__all__ = ["Costs", "costs"]


@dataclass(frozen=True)
class Costs:
    """The table, the bar charts, and the first metric against seconds and against epoch equivalents."""

    template: ClassVar[str] = "cost.html"
    rows: list[CostRow]
    bars: list[Picture]
    trade_offs: list[Picture]
    tuned: bool

    @property
    def all_exclusive(self) -> bool:
        """Whether no other job ran at the time of any run."""
        return all(row.exclusive for row in self.rows)


def costs(context: Context, table: ScoreTable) -> Costs:
    """Return costs and trade-offs by the first metric of `table`."""
    rows = cost_rows(context.results)
    seconds = {row.method: (row.fit_seconds, row.predict_seconds) for row in rows}
    trade_offs = [
        _trade_off(context, table, rows, "accuracy and time", "total seconds", lambda row: row.total_seconds),
        _trade_off(context, table, rows, "accuracy and passes", "epoch equivalents", lambda row: row.passes),
    ]
    bars = context.render([times(seconds, context.palette)]) if rows else []
    return Costs(rows, bars, context.render(trade_offs), table.tuned)


def _trade_off(
    context: Context,
    table: ScoreTable,
    rows: list[CostRow],
    name: str,
    label: str,
    cost: Callable[[CostRow], float | None],
) -> Drawing | None:
    """Draw the methods that finished every seed; None if fewer than two have a positive cost and the metric."""
    metric = table.metrics[0]
    complete = context.results.complete_methods
    points = {}
    for row in rows:
        spent = cost(row)
        entry = table.entries.get(row.method, {}).get(metric.key)
        if spent and entry is not None and row.method in complete and isfinite(entry.interval.mean):
            points[row.method] = MethodPoint(spent, entry.interval.mean, row.exclusive, entry.not_worse_than_best)
    if len(points) < 2:
        return None
    return pareto(name, points, context.palette, labels=(label, metric.label), lower=metric.better == "lower")
