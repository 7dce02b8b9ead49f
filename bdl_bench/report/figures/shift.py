"""A metric against the severity of a shift, one figure per family of shifts; severity 0 is the test rows."""

from __future__ import annotations

from collections.abc import Mapping

from bdl_bench.report.figures.canvas import Drawing, Margins, panel
from bdl_bench.report.figures.labels import beside_ends
from bdl_bench.report.palette import Palette

__all__ = ["shift_figure"]

Curves = Mapping[str, Mapping[int, float]]


def shift_figure(family: str, metric: str, curves: Curves, palette: Palette) -> Drawing:
    """Draw means over seeds, one line per method with its name at its end."""
    height = max(2.4, 0.135 * len(curves) + 0.7)
    with panel("severity", metric, size=(4.2, height), margins=Margins(left=0.58, right=1.52)) as axes:
        for method, points in curves.items():
            style = palette[method]
            severities = sorted(points)
            axes.plot(severities, [points[s] for s in severities], color=style.colour, ls=style.dash, lw=1.3)
        severities = sorted({s for points in curves.values() for s in points})
        axes.set_xticks(severities, ["test" if s == 0 else str(s) for s in severities])
        axes.set_xlim(severities[0], severities[-1])
        beside_ends(axes, {m: (max(p), p[max(p)]) for m, p in curves.items()}, palette)
    ends = ", ".join(f"{m} {p[max(p)]:.3g}" for m, p in curves.items())
    words = f"{metric} against the severity of {family}; at the highest: {ends}"
    return Drawing.of(axes, f"shift {family} {metric}", f"{family}: {metric}", words)
