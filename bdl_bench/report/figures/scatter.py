"""The standard deviation of a method at each output against the exact one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bdl_bench.report.figures.canvas import BAD, Drawing, Margins, diagonal, log_axis, panel
from bdl_bench.report.palette import Style

__all__ = ["scatter"]

Floats = NDArray[np.float64]
_POINTS = 300


def scatter(method: str, style: Style, variance: Floats, exact: Floats, *, marked: list[int]) -> Drawing | None:
    """Draw logarithmic axes with circles at the flat indices in `marked`; None if no variance is positive."""
    x, y = np.sqrt(exact.reshape(-1)), np.sqrt(np.maximum(variance.reshape(-1), 0.0))
    positive = np.flatnonzero((y > 0) & (x > 0))
    if not len(positive):
        return None
    chosen = positive
    if len(positive) > _POINTS:
        chosen = np.random.default_rng(0).choice(positive, _POINTS, replace=False)
    ringed = [i for i in marked if x[i] > 0 and y[i] > 0]
    with panel("exact std", "std of the method", margins=Margins(left=0.64)) as axes:
        low, high = float(x[positive].min()) / 1.1, float(x[positive].max()) * 1.1
        bottom, top = np.quantile(y[positive], (0.002, 0.998))
        diagonal(axes, low, high)
        axes.plot(*_dots(x[chosen], y[chosen]), color=style.colour, alpha=0.5, lw=2, solid_capstyle="round")
        axes.scatter(x[ringed], y[ringed], s=18, facecolors="none", edgecolors=BAD, linewidths=0.8)
        log_axis(axes, "x", low, high, most=60)
        log_axis(axes, "y", min(low, bottom / 1.15), max(high, top * 1.15), most=60)
    words = f"Standard deviation of {method} against the exact one, {len(chosen)} outputs"
    return Drawing.of(axes, f"agreement {method}", method, words)


def _dots(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return the points as strokes of zero length with round ends: one path is a tenth of the size of markers."""
    gaps = np.full_like(x, np.nan)
    return np.stack([x, x * (1 + 1e-9), gaps], 1).reshape(-1), np.stack([y, y, gaps], 1).reshape(-1)
