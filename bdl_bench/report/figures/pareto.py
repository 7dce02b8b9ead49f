"""Accuracy–cost trade-off: a point per method, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes

from bdl_bench.report.figures.canvas import GUIDE, Drawing, Margins, log_axis, panel
from bdl_bench.report.figures.labels import around_points
from bdl_bench.report.palette import Palette

__all__ = ["MethodPoint", "pareto", "pareto_front"]


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
