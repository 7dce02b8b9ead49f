"""Tuning scores over the tuned option, and over option × variance scale (McInerney and Kallus 2025, Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FixedLocator

from bdl_bench.report.figures.canvas import BAD, INK, Drawing, Margins, log_axis, panel
from bdl_bench.report.figures.labels import beside_ends
from bdl_bench.report.palette import Palette
from bdl_bench.report.tuning_curves import Line, ScoreGrid

__all__ = ["contours", "tuning_curves"]


def tuning_curves(name: str, option: str, score: str, lines: Mapping[str, Line], palette: Palette) -> Drawing:
    """Draw one line per method, with a dot at the selected value and a red ring if that is at the boundary."""
    height = max(2.5, 0.135 * len(lines) + 0.75)
    with panel(option, f"validation {score}", size=(4.2, height), margins=Margins(left=0.58, right=1.52)) as axes:
        every = np.concatenate([line.x for line in lines.values()])
        log_axis(axes, "x", float(every.min()), float(every.max()), most=60)
        for method, line in lines.items():
            style = palette[method]
            score_at_selected = float(np.interp(np.log(line.selected), np.log(line.x), line.score))
            axes.plot(line.x, line.score, color=style.colour, ls=style.dash, lw=1.3)
            axes.plot(line.selected, score_at_selected, "o", color=style.colour, ms=3.6, clip_on=False, zorder=4)
            if line.at_boundary:
                axes.plot(line.selected, score_at_selected, "o", mec=BAD, mfc="none", ms=8, clip_on=False, zorder=5)
        low, high = _visible(list(lines.values()))
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        beside_ends(axes, {m: (line.x[-1], min(max(line.score[-1], low), high)) for m, line in lines.items()}, palette)
    found = ", ".join(f"{m} {line.selected:.3g}" for m, line in lines.items())
    title = f"validation {score} over {option}"
    return Drawing.of(axes, name, title, f"{title}; selected: {found}")


def _visible(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the limits: from the lowest score to the highest minimum plus the 60 % quantile of scores above it."""
    lowest = [float(line.score.min()) for line in lines]
    excess = np.concatenate([line.score - low for line, low in zip(lines, lowest, strict=True)])
    room = float(np.quantile(excess, 0.6)) or float(excess.max()) or 1.0
    return min(lowest), max(lowest) + room


def contours(method: str, option: str, score: str, grid: ScoreGrid) -> Drawing:
    """Draw contours of the score above its minimum, light is low, with a cross at the selected values."""
    excess = np.ma.masked_invalid(grid.score - np.nanmin(grid.score))
    top = float(np.nanquantile(excess.compressed(), 0.9)) or 1.0
    levels = np.array([0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0]) * top
    with panel(option, "variance scale", size=(2.05, 1.95), margins=Margins(left=0.52, bottom=0.4)) as axes:
        axes.contourf(grid.option, grid.scale, excess.T, levels=levels, cmap="cividis_r", extend="max")
        log_axis(axes, "x", float(grid.option[0]), float(grid.option[-1]), most=10)
        log_axis(axes, "y", float(grid.scale[0]), float(grid.scale[-1]), most=10)
        for which in (axes.xaxis, axes.yaxis):
            which.set_major_locator(FixedLocator(_decades(*which.get_view_interval())))
        axes.plot(*grid.selected, "x", color=BAD if grid.at_boundary else INK, ms=6, mew=1.8, clip_on=False, zorder=4)
    words = (
        f"Validation {score} of {method} over {option} and variance scale; selected {grid.selected[0]:.3g} and "
        f"{grid.selected[1]:.3g}{', at the boundary of the range' if grid.at_boundary else ''}"
    )
    return Drawing.of(axes, f"contour {method}", method, words)


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten in the range, at most four."""
    first, last = int(np.ceil(np.log10(low) - 1e-9)), int(np.floor(np.log10(high) + 1e-9))
    step = max(1, -(-(last - first + 1) // 4))
    return [10.0**power for power in range(first, last + 1, step)]
