"""Tuning trials as curves and contours: the best score at each value, minimised over all other options.

The contours are those of McInerney and Kallus (2025), Figure 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from bdl_bench.records.record import Tuning
from bdl_bench.report.figures.canvas import BAD, INK, WIDE, Drawing, Margins, log_axis, panel
from bdl_bench.report.figures.labels import beside_ends
from bdl_bench.report.palette import Palette

__all__ = ["SCALE", "Line", "ScoreGrid", "contours", "line", "score_grid", "tuning_curves"]

Floats = NDArray[np.float64]
SCALE = "variance_scale"
_FEWEST = 3
"""Values below this number are not drawn as a line or as a side of a grid."""


@dataclass(frozen=True)
class Line:
    """The best score over one quantity, and the selected value."""

    x: Floats
    score: Floats
    selected: float
    at_boundary: bool


@dataclass(frozen=True)
class ScoreGrid:
    """The best scores (A, B) over the tuned option (A,) and the variance scale (B,); NaN without a trial."""

    option: Floats
    scale: Floats
    score: Floats
    selected: tuple[float, float]
    at_boundary: bool


def line(tuning: Tuning, quantity: str) -> Line | None:
    """Return the best score over "value" (the tuned option) or another quantity; None for fewer than three values."""
    values, scores = _columns(tuning, quantity)
    if not len(values):
        return None
    x, index = np.unique(values, return_inverse=True)
    best = np.full(len(x), np.inf)
    np.minimum.at(best, index, scores)
    if len(x) < _FEWEST:
        return None
    return Line(x, best, _selected(tuning, quantity, x, best), _at_boundary(tuning, quantity))


def score_grid(tuning: Tuning) -> ScoreGrid | None:
    """Return the best score over option and variance scale; None for fewer than three values of either."""
    values, scales, scores = _columns(tuning, "value", SCALE)
    if not len(values):
        return None
    option, a = np.unique(values, return_inverse=True)
    scale, b = np.unique(scales, return_inverse=True)
    if min(len(option), len(scale)) < _FEWEST:
        return None
    best = np.full((len(option), len(scale)), np.inf)
    np.minimum.at(best, (a, b), scores)
    best[np.isinf(best)] = np.nan
    over_option, over_scale = np.nanmin(best, axis=1), np.nanmin(best, axis=0)
    selected = _selected(tuning, "value", option, over_option), _selected(tuning, SCALE, scale, over_scale)
    return ScoreGrid(option, scale, best, selected, _at_boundary(tuning, "value") or _at_boundary(tuning, SCALE))


def _columns(tuning: Tuning, *names: str) -> list[Floats]:
    """Return these quantities of the trials that have all of them, positive, and then the score, finite."""
    wanted = (*names, "score")
    rows = [[p.get(name) for name in wanted] for p in tuning.points]
    table = np.array([row for row in rows if None not in row], dtype=np.float64).reshape(-1, len(wanted))
    kept = table[np.isfinite(table).all(1) & (table[:, :-1] > 0).all(1)]
    return list(kept.T)


def _selected(tuning: Tuning, quantity: str, tried: Floats, best: Floats) -> float:
    """Return the selected value, which may lie between the trials, clipped to the range of the figure."""
    chosen = tuning.chosen.get(quantity)
    if chosen is None:
        chosen = float(tried[int(np.argmin(best))])
    return float(np.clip(chosen, tried[0], tried[-1]))


def _at_boundary(tuning: Tuning, quantity: str) -> bool:
    return bool({quantity, tuning.option if quantity == "value" else quantity} & set(tuning.at_boundary))


def tuning_curves(name: str, option: str, score: str, lines: Mapping[str, Line], palette: Palette) -> Drawing:
    """Draw one line per method, with a dot at the selected value and a red ring if that is at the boundary."""
    height = max(2.5, 0.135 * len(lines) + 0.75)
    with panel(option, f"validation {score}", size=(WIDE, height), margins=Margins(left=0.58, right=1.4)) as axes:
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
    with panel(option, "variance scale", size=(1.8, 1.75), margins=Margins(left=0.52, bottom=0.4)) as axes:
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
