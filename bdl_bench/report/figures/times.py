"""Time to fit and to predict (McInerney and Kallus 2025, Figure 5): bars on a common logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bdl_bench.report.figures.canvas import INK, Drawing, blank, log_axis
from bdl_bench.report.figures.labels import short
from bdl_bench.report.palette import Palette
from estimators.runtime.units import in_seconds

__all__ = ["times"]

_ROW, _NAMES, _WIDTH = 0.17, 1.4, 4.1


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
