"""Time and memory, and the trade-off between accuracy and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bdl_bench.methods import BASELINE
from bdl_bench.report.figures.canvas import GUIDE, INK, PAPER, WIDE, Drawing, Margins, blank, log_axis, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import MOST_NAMES, around_points, main_range, short
from bdl_bench.report.formatting import join_names
from bdl_bench.report.palette import Palette
from bdl_bench.report.reference_agreement import CostRow, cost_rows
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.sections.context import Context
from bdl_bench.stats import Comparisons, Interval
from estimators.runtime.units import in_seconds

__all__ = ["Costs", "MethodPoint", "costs", "significant_front"]

_ROW, _NAMES, _WIDTH = 0.17, 1.28, WIDE


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
    seconds = {row.method: (row.fit_seconds + (row.tuning_seconds or 0.0), row.predict_seconds) for row in rows}
    trade_offs = [
        _trade_off(context, table, rows, "accuracy and time", "seconds to fit, tune and predict", _seconds),
        _trade_off(context, table, rows, "accuracy and passes", "epoch equivalents", _passes),
    ]
    bars = context.render([times(seconds, context.palette)]) if rows else []
    return Costs(rows, bars, context.render(trade_offs), table.tuned)


Range = tuple[float, float, float]


def _seconds(row: CostRow) -> Range | None:
    """Return the median, smallest and largest seconds over seeds."""
    return row.total_seconds, *(row.seconds_range or (row.total_seconds,) * 2)


def _passes(row: CostRow) -> Range | None:
    return None if not row.passes else (row.passes, *(row.passes_range or (row.passes,) * 2))


def _trade_off(
    context: Context,
    table: ScoreTable,
    rows: list[CostRow],
    name: str,
    label: str,
    cost: Callable[[CostRow], Range | None],
) -> Drawing | None:
    """Draw the methods that finished every seed; None if fewer than two have a positive cost and the metric.

    The axis is the difference from the baseline, whose interval is paired and so narrower than that of the metric;
    without a baseline, it is the metric.
    """
    metric = table.metrics[0]
    tests = table.tests.get(metric.key, Comparisons())
    against = tests.baseline_differences
    points = {}
    for row in rows:
        spent = cost(row)
        entry = table.entries.get(row.method, {}).get(metric.key)
        if spent is None or not spent[1] or entry is None or row.method not in context.results.complete_methods:
            continue
        shown = entry.interval if not against else against.get(row.method, Interval(0.0, None, None, 1))
        if isfinite(shown.mean):
            points[row.method] = MethodPoint(spent, shown, row.exclusive, entry.not_worse_than_best)
    if len(points) < 2:
        return None
    named = f"{metric.label} − that of {BASELINE}" if against else metric.label
    front = significant_front(points, tests)
    return trade_off(
        name, points, context.palette, labels=(label, named), front=front, lower_is_better=metric.better == "lower"
    )


def times(seconds: Mapping[str, tuple[float, float]], palette: Palette) -> Drawing:
    """Draw seconds (fit and tune, predict), one row per method."""
    methods = list(seconds)
    height = _ROW * len(methods) + 0.62
    with blank((_WIDTH, height)) as figure:
        for column, title in enumerate(("fit and tune", "predict all test rows")):
            axes = _axes(figure, column, len(methods))
            _bars(axes, [seconds[m][column] for m in methods], [palette[m].colour for m in methods])
            axes.set_title(title, fontsize=8, loc="left", pad=3)
            axes.set_xlabel("seconds")
            axes.set_yticks(range(len(methods)), [short(m) for m in methods] if column == 0 else [], fontsize=7.5)
    words = "; ".join(f"{m}: fit and tune {in_seconds(a)}, predict {in_seconds(b)}" for m, (a, b) in seconds.items())
    return Drawing("times", "Time to fit and tune, and to predict", words, figure)


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
    log_axis(axes, "x", low, high, most=10, ticks=4)
    for row, (value, colour) in enumerate(zip(values, colours, strict=True)):
        shown = max(value, low)
        axes.barh(row, shown - low, left=low, height=0.62, color=colour, alpha=0.85)
        axes.text(shown * 1.12, row, in_seconds(value), va="center", fontsize=6.5, color=INK)


@dataclass(frozen=True)
class MethodPoint:
    """Cost and metric of a method.

    Args:
        cost: median, smallest and largest over seeds.
        value: the metric, or its difference from the baseline.
        exclusive: whether no job ran beside it.
        best: whether it is not significantly worse than the best.
    """

    cost: Range
    value: Interval
    exclusive: bool = True
    best: bool = False


def significant_front(points: Mapping[str, MethodPoint], tests: Comparisons) -> list[str]:
    """Return the methods at which paying more is shown to help, cheapest first.

    The cheapest method is the first. A more expensive one follows if it is significantly better than the one before it.

    Args:
        points: the methods.
        tests: of all pairs of methods by the metric.

    Returns:
        Their names; a front of one method says that no more expensive one is shown to be better.
    """
    found: list[str] = []
    for method in sorted(points, key=lambda m: points[m].cost[0]):
        if not found or tests.with_method(found[-1]).get(method) == "better":
            found.append(method)
    return found


def trade_off(
    name: str,
    points: Mapping[str, MethodPoint],
    palette: Palette,
    *,
    labels: tuple[str, str],
    front: list[str],
    lower_is_better: bool,
) -> Drawing:
    """Draw points with error bars over logarithmic cost; hollow if the cost is not exclusive, names in bold if `best`.

    A line joins the methods of `front`, if there are two or more. Of many methods, the best means have names. Methods
    far outside of the others are not drawn, but named in the caption.
    """
    with panel(*labels, size=(WIDE, 2.9), margins=Margins(left=0.7)) as axes:
        low, high = min(p.cost[1] for p in points.values()), max(p.cost[2] for p in points.values())
        log_axis(axes, "x", low / 2.2, high * 2.2, most=80)
        limits = _limits([p.value for p in points.values()])
        axes.set_ylim(*limits)
        if len(front) > 1:
            ends = [points[m].cost[0] for m in front], [points[m].value.mean for m in front]
            axes.step(*ends, where="post", color=GUIDE, lw=1.2, zorder=0)
        for method, point in points.items():
            style, value = palette[method], point.value
            bar: dict[str, Any] = {
                "color": style.colour,
                "lw": 1.0,
                "alpha": 0.45,
                "zorder": 1,
                "solid_capstyle": "butt",
            }
            axes.plot(point.cost[1:], (value.mean,) * 2, **bar)
            if value.low is not None and value.high is not None:
                axes.plot((point.cost[0],) * 2, (value.low, value.high), **bar)
            face = style.colour if point.exclusive else PAPER
            axes.plot(
                point.cost[0], value.mean, marker=style.marker, ms=4.5, color=style.colour, mfc=face, ls="", zorder=3
            )
        best = {m for m, p in points.items() if p.best}
        inside = {m: p for m, p in points.items() if limits[0] <= p.value.mean <= limits[1]}
        sign = 1 if lower_is_better else -1
        named = sorted(inside, key=lambda m: sign * inside[m].value.mean)[:MOST_NAMES]
        around_points(axes, {m: (inside[m].cost[0], inside[m].value.mean) for m in named}, palette, bold=best)
    words = f"{labels[1]} against {labels[0]}, with 95 % intervals"
    if len(front) > 1:
        words += f"; significantly better at a higher cost: {', '.join(front)}"
    outside = [m for m in points if m not in inside]
    without = f" (far outside: {join_names(outside)})" if outside else ""
    return Drawing.of(axes, name, f"{labels[1]}, against {labels[0]}{without}", words)


def _limits(values: Sequence[Interval]) -> tuple[float, float]:
    """Return the limits: the means, and the ends of intervals up to three times the range of the means beyond them."""
    low, high = main_range([v.mean for v in values])
    room = 3 * (high - low) or 1.0
    bottom = max(low - room, min([low, *(v.low for v in values if v.low is not None)]))
    top = min(high + room, max([high, *(v.high for v in values if v.high is not None)]))
    return bottom - 0.08 * (top - bottom or 1.0), top + 0.08 * (top - bottom or 1.0)
