"""Quality against cost: a point a method, and the line of those that no cheaper method beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes

from bdl_bench.report.figures.canvas import GUIDE, Drawing, Margins, log_axis, panel
from bdl_bench.report.figures.labels import around_points
from bdl_bench.report.palette import Palette

__all__ = ["Price", "frontier", "pareto"]


@dataclass(frozen=True)
class Price:
    """Cost and quality of a method; `exclusive` False where other jobs ran at the time; `best` in the best group."""

    cost: float
    value: float
    exclusive: bool = True
    best: bool = False


def pareto(
    name: str, prices: Mapping[str, Price], palette: Palette, *, labels: tuple[str, str], lower: bool
) -> Drawing:
    """Logarithmic cost; hollow where the cost is not exclusive; names of the best group in bold."""
    with panel(*labels, size=(4.1, 3.1), margins=Margins(left=0.6)) as axes:
        costs = [p.cost for p in prices.values()]
        log_axis(axes, "x", min(costs) / 2.2, max(costs) * 2.2, most=80)
        _limit_values(axes, prices)
        edge = frontier(prices, lower=lower)
        axes.step(
            [prices[m].cost for m in edge], [prices[m].value for m in edge], where="post", color=GUIDE, lw=1.2, zorder=0
        )
        for method, price in prices.items():
            style = palette[method]
            face = style.colour if price.exclusive else "white"
            axes.plot(
                price.cost, price.value, marker=style.marker, ms=4.5, color=style.colour, mfc=face, ls="", zorder=3
            )
        best = {m for m, p in prices.items() if p.best}
        around_points(axes, {m: (p.cost, p.value) for m, p in prices.items()}, palette, bold=best)
    words = f"{labels[1]} against {labels[0]}; no cheaper method is better than: {', '.join(edge)}"
    return Drawing.of(axes, name, f"{labels[1]} against {labels[0]}", words)


def frontier(prices: Mapping[str, Price], *, lower: bool) -> list[str]:
    """Methods that beat every cheaper one, cheapest first."""
    sign = 1 if lower else -1
    found: list[str] = []
    best = float("inf")
    for method in sorted(prices, key=lambda m: (prices[m].cost, sign * prices[m].value)):
        if sign * prices[method].value < best:
            best = sign * prices[method].value
            found.append(method)
    return found


def _limit_values(axes: Axes, prices: Mapping[str, Price]) -> None:
    values = [p.value for p in prices.values()]
    low, high = min(values), max(values)
    room = 0.12 * ((high - low) or abs(high) or 1.0)
    axes.set_ylim(low - room, high + room)
