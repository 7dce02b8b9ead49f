"""Time and memory, and the trade-off between accuracy and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bdl_bench.report.figures.canvas import GUIDE, INK, Drawing, Margins, blank, log_axis, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import around_points, short
from bdl_bench.report.palette import Palette
from bdl_bench.report.reference_agreement import CostRow, cost_rows
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.sections.context import Context
from estimators.runtime.units import in_seconds

__all__ = ["Costs", "MethodPoint", "costs", "pareto_front"]

_ROW, _NAMES, _WIDTH = 0.17, 1.4, 4.1


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


def times(seconds: Mapping[str, tuple[float, float]], palette: Palette) -> Drawing:
    """Draw seconds (fit, predict), one row per method."""
    methods = list(seconds)
    height = _ROW * len(methods) + 0.62
    with blank((_WIDTH, height)) as figure:
        for column, title in enumerate(("fit", "predict all test rows")):
            axes = _axes(figure, column, len(methods))
            _bars(axes, [seconds[m][column] for m in methods], [palette[m].colour for m in methods])
            axes.set_title(title, fontsize=8, loc="left", pad=3)
            axes.set_xlabel("seconds")
            axes.set_yticks(range(len(methods)), [short(m) for m in methods] if column == 0 else [], fontsize=7.5)
    words = "; ".join(f"{m}: fit {in_seconds(a)}, predict {in_seconds(b)}" for m, (a, b) in seconds.items())
    return Drawing("times", "Time to fit and to predict", words, figure)


def _axes(figure: Figure, column: int, rows: int) -> Axes:
    width, height = figure.get_size_inches()
    each = (width - _NAMES - 0.55) / 2
    left = _NAMES + column * (each + 0.3)
    axes = figure.add_axes((left / width, 0.36 / height, each / width, _ROW * rows / height))
    axes.set_ylim(rows - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return axes


def _bars(axes: Axes, values: list[float], colours: list[str]) -> None:
    positive = [v for v in values if v > 0] or [1e-3]
    low, high = min(positive) / 3, max(positive) * 12
    log_axis(axes, "x", low, high, most=10)
    for row, (value, colour) in enumerate(zip(values, colours, strict=True)):
        shown = max(value, low)
        axes.barh(row, shown - low, left=low, height=0.62, color=colour, alpha=0.85)
        axes.text(shown * 1.12, row, in_seconds(value), va="center", fontsize=6.5, color=INK)


@dataclass(frozen=True)
class MethodPoint:
    """Cost and metric of a method. `best`: not significantly worse than the best; `exclusive`: no job ran beside it."""

    cost: float
    value: float
    exclusive: bool = True
    best: bool = False


def pareto(
    name: str, points: Mapping[str, MethodPoint], palette: Palette, *, labels: tuple[str, str], lower: bool
) -> Drawing:
    """Draw a metric against logarithmic cost; hollow if the cost is not exclusive, names in bold if `best`."""
    with panel(*labels, size=(4.1, 3.1), margins=Margins(left=0.75)) as axes:
        costs = [p.cost for p in points.values()]
        log_axis(axes, "x", min(costs) / 2.2, max(costs) * 2.2, most=80)
        _limit_values(axes, points)
        front = pareto_front(points, lower=lower)
        axes.step(
            [points[m].cost for m in front],
            [points[m].value for m in front],
            where="post",
            color=GUIDE,
            lw=1.2,
            zorder=0,
        )
        for method, point in points.items():
            style = palette[method]
            face = style.colour if point.exclusive else "white"
            axes.plot(
                point.cost, point.value, marker=style.marker, ms=4.5, color=style.colour, mfc=face, ls="", zorder=3
            )
        best = {m for m, p in points.items() if p.best}
        around_points(axes, {m: (p.cost, p.value) for m, p in points.items()}, palette, bold=best)
    words = f"{labels[1]} against {labels[0]}; Pareto front: {', '.join(front)}"
    return Drawing.of(axes, name, f"{labels[1]} against {labels[0]}", words)


def pareto_front(points: Mapping[str, MethodPoint], *, lower: bool) -> list[str]:
    """Return the methods that are better than every cheaper one, cheapest first."""
    sign = 1 if lower else -1
    found: list[str] = []
    best = float("inf")
    for method in sorted(points, key=lambda m: (points[m].cost, sign * points[m].value)):
        if sign * points[method].value < best:
            best = sign * points[method].value
            found.append(method)
    return found


def _limit_values(axes: Axes, points: Mapping[str, MethodPoint]) -> None:
    values = [p.value for p in points.values()]
    low, high = min(values), max(values)
    room = 0.12 * ((high - low) or abs(high) or 1.0)
    axes.set_ylim(low - room, high + room)
