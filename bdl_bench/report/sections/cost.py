"""Time and memory, and quality against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.pareto import Price, pareto
from bdl_bench.report.figures.times import times
from bdl_bench.report.reference_agreement import CostRow, cost_rows
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.sections.context import Context

__all__ = ["Costs", "costs"]


@dataclass(frozen=True)
class Costs:
    """The table, the bars, and the first metric against seconds and passes."""

    template: ClassVar[str] = "cost.html"
    rows: list[CostRow]
    bars: list[Picture]
    trade_offs: list[Picture]
    tuned: bool

    @property
    def all_exclusive(self) -> bool:
        """Nothing else ran at the time of any cell."""
        return all(row.exclusive for row in self.rows)


def costs(context: Context, table: ScoreTable) -> Costs:
    """By the first metric of `table`."""
    rows = cost_rows(context.results)
    seconds = {row.method: (row.fit_seconds, row.predict_seconds) for row in rows}
    trade_offs = [
        _trade_off(context, table, rows, "quality against time", "seconds, in all", lambda row: row.total_seconds),
        _trade_off(
            context, table, rows, "quality against passes", "passes over the training rows", lambda row: row.passes
        ),
    ]
    bars = context.show([times(seconds, context.palette)]) if rows else []
    return Costs(rows, bars, context.show(trade_offs), table.tuned)


def _trade_off(
    context: Context,
    table: ScoreTable,
    rows: list[CostRow],
    name: str,
    label: str,
    cost: Callable[[CostRow], float | None],
) -> Drawing | None:
    """Of methods that have every seed; None where fewer than two have both a positive cost and the metric."""
    metric = table.metrics[0]
    complete = context.results.complete_methods
    prices = {}
    for row in rows:
        spent = cost(row)
        cell = table.cells.get(row.method, {}).get(metric.key)
        if spent and cell is not None and row.method in complete and isfinite(cell.interval.mean):
            prices[row.method] = Price(spent, cell.interval.mean, row.exclusive, cell.in_best_group)
    if len(prices) < 2:
        return None
    return pareto(name, prices, context.palette, labels=(label, metric.label), lower=metric.better == "lower")
