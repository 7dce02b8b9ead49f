"""Average ranks over tasks with the critical difference (Demšar 2006, Figure 1)."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from bdl_bench.report.figures.canvas import INK, SOFT, Drawing, blank
from bdl_bench.report.figures.labels import short
from bdl_bench.report.palette import Palette
from bdl_bench.stats import Ranking

__all__ = ["critical_difference_figure"]

_WIDTH, _ROW, _SIDE = 4.1, 0.17, 1.3


def critical_difference_figure(ranking: Ranking, palette: Palette) -> Drawing:
    """Draw the best rank at the left; bars join ranks that differ by no more than the critical difference."""
    ranks, difference, bars = ranking.average, ranking.critical_difference, ranking.groups
    ordered = list(ranks)
    half = (len(ordered) + 1) // 2
    top, between = 0.62, 0.09 * len(bars) + 0.12
    height = top + between + _ROW * half + 0.08
    with blank((_WIDTH, height)) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, _WIDTH)
        axes.set_ylim(height, 0)
        last = max(2, len(ordered))

        def position(rank: float) -> float:
            return _SIDE + (_WIDTH - 2 * _SIDE) * (rank - 1) / (last - 1)

        _scale(axes, top, last, position, difference)
        for row, method in enumerate(ordered):
            left = row < half
            y = top + between + _ROW * (0.5 + (row if left else len(ordered) - 1 - row))
            _name(
                axes,
                method,
                f"{ranks[method]:.2f}",
                position(ranks[method]),
                top,
                y,
                left=left,
                colour=palette[method].colour,
            )
        for row, members in enumerate(bars):
            y = top + 0.1 + 0.09 * row
            ends = position(ranks[members[0]]) - 0.04, position(ranks[members[-1]]) + 0.04
            axes.plot(ends, (y, y), color=INK, lw=3, solid_capstyle="round", zorder=4)
    words = "Average ranks: " + ", ".join(f"{m} {ranks[m]:.2f}" for m in ordered)
    words += f"; critical difference {difference:.2f}"
    return Drawing("critical difference", "Average rank over tasks", words, figure)


def _scale(axes: Axes, y: float, last: int, position: Callable[[float], float], difference: float) -> None:
    axes.plot((position(1), position(last)), (y, y), color=INK, lw=0.9)
    step = 1 if last <= 12 else 2 if last <= 24 else 5
    for rank in range(1, last + 1):
        long = (rank - 1) % step == 0 or rank == last
        axes.plot((position(rank),) * 2, (y - (0.07 if long else 0.04), y), color=INK, lw=0.8)
        if long:
            axes.text(position(rank), y - 0.1, str(rank), ha="center", va="bottom", fontsize=7.5)
    end = position(min(1 + difference, float(last)))
    cut = " (longer than the axis)" if 1 + difference > last else ""
    axes.plot((position(1), end), (0.2, 0.2), color=SOFT, lw=2)
    axes.text(position(1), 0.15, f"critical difference {difference:.2f}{cut}", ha="left", va="bottom", fontsize=7.5)


def _name(axes: Axes, method: str, rank: str, x: float, top: float, y: float, *, left: bool, colour: str) -> None:
    end = _SIDE - 0.1 if left else _WIDTH - _SIDE + 0.1
    axes.plot((x, x, end), (top, y, y), color=colour, lw=0.8, zorder=1)
    text = f"{short(method)} {rank}" if left else f"{rank} {short(method)}"
    axes.text(
        end + (-0.04 if left else 0.04),
        y,
        text,
        ha="right" if left else "left",
        va="center",
        fontsize=7.5,
        color=colour,
    )
