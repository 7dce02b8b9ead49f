"""Direct labels instead of legends: beside the ends of lines, stacked in a corner, or around points."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from bdl_bench.report.figures.canvas import GUIDE, PAPER
from bdl_bench.report.palette import Palette

__all__ = ["MOST_NAMES", "around_points", "beside_ends", "main_range", "short", "spread_labels", "stacked"]

Floats = NDArray[np.float64]
MOST_NAMES = 14
"""Names beside points of one figure; more of them cover each other."""
_FENCE = 10.0
"""Values this many interquartile ranges beyond the quartiles lie outside of a figure, so that a method that failed does
not hide the differences between all others."""
_SIZE = 7.5
_OPAQUE = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}  # lines are not drawn through a name
_OFFSETS = tuple(
    (distance * x, distance * y)
    for distance in (6, 11, 17, 24, 32, 41)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))
)


def short(name: str, length: int = 20) -> str:
    """Return a name on one line, shortened in its middle to `length` characters."""
    plain = " ".join(name.split())
    if len(plain) <= length:
        return plain
    tail = (length - 1) // 3
    return f"{plain[: length - 1 - tail]}…{plain[-tail:]}"


def spread_labels(positions: Floats, gap: float, low: float, high: float) -> Floats:
    """Return the nearest positions (least squares) in the same order, `gap` apart, between low and high.

    y₍ᵢ₊₁₎ ≥ y₍ᵢ₎ + gap is monotonicity of y₍ᵢ₎ − i·gap, so this is an isotonic regression. The gap is reduced if the
    labels do not fit.
    """
    order = np.argsort(positions, kind="stable")
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    steps = gap * np.arange(len(positions))
    fitted = isotonic_regression(positions[order] - steps).x
    moved = np.empty_like(positions)
    moved[order] = np.clip(fitted, low, max(low, high - steps[-1])) + steps
    return moved


def main_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and largest of these values that are not far outside of the others."""
    low, high = np.quantile(values, (0.25, 0.75))
    fence = _FENCE * float(high - low) or np.inf
    inside = [v for v in values if low - fence <= v <= high + fence]
    return min(inside), max(inside)


def beside_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], palette: Palette) -> None:
    """Write the name of each line to the right of the axes, joined to its last point by a thin line."""
    if not ends:
        return
    figure = axes.figure
    box = axes.get_position()
    width, height = figure.get_size_inches() * 72  # type: ignore[union-attr]
    to_points = np.array([width * box.width, height * box.height])
    at = axes.transAxes.inverted().transform(axes.transData.transform(list(ends.values())))
    positions = spread_labels(at[:, 1] * to_points[1], _SIZE * 1.18, 0.0, float(to_points[1])) / to_points[1]
    for method, (x, y), position in zip(ends, at, positions, strict=True):
        label = 1 + 11 / to_points[0]
        axes.plot([x, label], [y, position], transform=axes.transAxes, color=GUIDE, lw=0.6, clip_on=False, zorder=0)
        axes.text(
            label + 2 / to_points[0], position, short(method), transform=axes.transAxes, va="center", fontsize=_SIZE,
            color=palette[method].colour,
        )  # fmt: skip


def stacked(
    axes: Axes, methods: Sequence[str], palette: Palette, *, corner: tuple[float, float] = (0.05, 0.98)
) -> None:
    """Write names one below the other in a corner of the axes, each with a short segment of its line."""
    height = axes.get_position().height * axes.figure.get_size_inches()[1] * 72  # type: ignore[union-attr]
    for index, method in enumerate(methods):
        style = palette[method]
        x, y = corner[0], corner[1] - (index + 0.5) * _SIZE * 1.2 / height
        axes.plot(
            [x, x + 0.13], [y, y], transform=axes.transAxes, color=style.colour, ls=style.dash, lw=1.3, zorder=4,
        )  # fmt: skip
        axes.text(
            x + 0.16, y, short(method, 22), transform=axes.transAxes, va="center", fontsize=_SIZE - 0.5,
            color=style.colour, zorder=4,
        )  # fmt: skip


def around_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], palette: Palette, *, bold: Collection[str] = ()
) -> None:
    """Write the name of each point at the position near it that overlaps least with other names and points."""
    box = axes.get_position()
    width, height = axes.figure.get_size_inches() * 72  # type: ignore[union-attr]
    scale = np.array([width * box.width, height * box.height])
    at = axes.transAxes.inverted().transform(axes.transData.transform(list(points.values()))) * scale
    taken = [(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y in at]
    for method, point in zip(points, at, strict=True):
        text = short(method)
        boxes = [_text_box(point, offset, len(text) * (1.12 if method in bold else 1.0)) for offset in _OFFSETS]
        costs = [_cost(b, taken, scale) + 0.3 * i for i, b in enumerate(boxes)]
        chosen = boxes[int(np.argmin(costs))]
        taken.append(chosen)
        corners = np.array(chosen).reshape(2, 2)
        (x, y), end = corners.mean(0) / scale, point.clip(*corners)
        axes.plot(*(np.stack([point, end]) / scale).T, transform=axes.transAxes, color=GUIDE, lw=0.6, zorder=0)
        axes.text(
            x, y, text, transform=axes.transAxes, ha="center", va="center", fontsize=_SIZE, zorder=2, bbox=_OPAQUE,
            color=palette[method].colour, weight="bold" if method in bold else "normal",
        )  # fmt: skip


Box = tuple[float, float, float, float]


def _text_box(point: Floats, offset: tuple[float, float], letters: float) -> Box:
    """Return the box of a text of so many letters, in points, at an offset from a point."""
    width, height = 0.58 * _SIZE * letters + 2, _SIZE * 1.1
    x, y = point[0] + offset[0], point[1] + offset[1]
    left = x if offset[0] > 0 else x - width if offset[0] < 0 else x - width / 2
    return left, y - height / 2, left + width, y + height / 2


def _cost(box: Box, taken: Sequence[Box], scale: Floats) -> float:
    """Return the overlap of a box with others, and 40 times its overhang beyond the axes."""
    covered = sum(_overlap(box, other) for other in taken)
    outside = max(0.0, -box[0]) + max(0.0, box[2] - scale[0]) + max(0.0, -box[1]) + max(0.0, box[3] - scale[1])
    return float(covered + 40 * outside)


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
