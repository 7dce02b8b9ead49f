"""Figures as SVG, each a data address that an <img> can hold: no request leaves the page, no script can run in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from scipy.stats import norm

from bdl_bench.metrics import class_arrays
from bdl_bench.metrics.calibration import Bins, equal_mass_bins
from bdl_bench.metrics.classification import confidence, correct

__all__ = ["Picture", "coverage_picture", "first_confidence", "reliability_picture", "scatter_picture"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]

INK, ACCENT, BASELINE, GUIDE = "#3b4350", "#0b5c8a", "#9aa3af", "#cfd5dc"
_POINTS = 1500
_BINS = 10
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": GUIDE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "svg.hashsalt": "bdl-bench",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Picture:
    """An image with the method it shows and its content in words."""

    title: str
    address: str
    description: str


def reliability_picture(method: str, arrays: Arrays, baseline: Arrays | None, *, start: float) -> Picture:
    """Accuracy against confidence in ten bins of equal mass with 95 % Wilson intervals; the baseline in grey."""
    bins = _top_label_bins(arrays)
    with _panel("mean confidence", "accuracy") as (figure, axes):
        _diagonal(axes, start, 1.0)
        if baseline is not None:
            grey = _top_label_bins(baseline)
            axes.plot(grey.confidence, grey.accuracy, color=BASELINE, lw=1.2, marker="o", ms=2)
        low, high = _wilson(bins)
        axes.vlines(bins.confidence, low, high, color=ACCENT, lw=0.8, alpha=0.5)
        axes.plot(bins.confidence, bins.accuracy, color=ACCENT, lw=1.4, marker="o", ms=3)
        axes.set_xlim(start, 1.01)
        axes.set_ylim(start, 1.02)
    pairs = ", ".join(f"{c:.2f}: {a:.2f}" for c, a in zip(bins.confidence, bins.accuracy, strict=True))
    return Picture(method, _address(figure), f"Reliability of {method}; confidence: accuracy {pairs}")


def coverage_picture(method: str, arrays: Arrays, baseline: Arrays | None) -> Picture:
    """Share of targets inside central intervals against their nominal level; the baseline in grey."""
    levels = np.linspace(0.02, 0.98, 49)
    observed = _coverages(arrays, levels)
    with _panel("nominal coverage", "observed coverage") as (figure, axes):
        _diagonal(axes, 0.0, 1.0)
        if baseline is not None:
            axes.plot(levels, _coverages(baseline, levels), color=BASELINE, lw=1.2)
        axes.plot(levels, observed, color=ACCENT, lw=1.6)
        axes.set_xlim(0, 1.0)
        axes.set_ylim(0, 1.02)
    shown = ", ".join(f"{level:.2f}: {share:.2f}" for level, share in zip(levels[4::10], observed[4::10], strict=True))
    return Picture(method, _address(figure), f"Coverage of {method}; nominal: observed {shown}")


def scatter_picture(method: str, variance: Floats, exact: Floats) -> Picture | None:
    """Standard deviation of a method against the exact one on logarithmic axes; None where no variance is positive."""
    x, y = np.sqrt(exact.reshape(-1)), variance.reshape(-1)
    positive = (y > 0) & (x > 0)
    if not positive.any():
        return None
    x, y = x[positive], np.sqrt(y[positive])
    if len(x) > _POINTS:
        chosen = np.random.default_rng(0).choice(len(x), _POINTS, replace=False)
        x, y = x[chosen], y[chosen]
    with _panel("exact standard deviation", "standard deviation of the method") as (figure, axes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = float(x.min()), float(x.max())
        _diagonal(axes, low, high)
        alpha = 0.7 if len(x) < 300 else 0.35
        axes.scatter(x, y, s=5, color=ACCENT, alpha=alpha, linewidths=0, rasterized=True)
        bottom, top = np.quantile(y, (0.002, 0.998))
        axes.set_ylim(min(low, bottom) / 1.15, max(high, top) * 1.15)
        _plain_log_ticks(axes)
    return Picture(method, _address(figure), f"Standard deviation of {method} against the exact one, {len(x)} outputs")


def first_confidence(pooled: list[Arrays]) -> float:
    """Where a common axis of confidence starts: below every bin of every method, rounded down to a tenth."""
    lowest = min(min(b.confidence.min(), b.accuracy.min()) for b in map(_top_label_bins, pooled))
    return max(0.0, float(np.floor(lowest * 10 - 0.2) / 10))


def _top_label_bins(arrays: Arrays) -> Bins:
    probs, targets = class_arrays(arrays)
    return equal_mass_bins(confidence(probs), correct(probs, targets), n_bins=_BINS)


def _coverages(arrays: Arrays, levels: Floats) -> Floats:
    """For each level the share of |z| within its quantile."""
    z = np.abs(arrays["targets"] - arrays["mean"]) / np.sqrt(arrays["total_variance"])
    ordered = np.sort(z.reshape(-1))
    shares: Floats = np.searchsorted(ordered, norm.ppf(0.5 + levels / 2), side="right") / len(ordered)
    return shares


def _wilson(bins: Bins, z: float = 1.96) -> tuple[Floats, Floats]:
    """95 % Wilson score intervals of the accuracy of each bin."""
    p, n = bins.accuracy, bins.count
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return centre - half, centre + half


def _diagonal(axes: Axes, low: float, high: float) -> None:
    axes.plot([low, high], [low, high], color=GUIDE, lw=1.0, zorder=0)


def _plain_log_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


@contextmanager
def _panel(x_label: str, y_label: str) -> Iterator[tuple[Figure, Axes]]:
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(2.9, 2.5), layout="constrained", dpi=150)
        axes = figure.add_subplot()
        yield figure, axes
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)


def _address(figure: Figure) -> str:
    buffer = io.BytesIO()
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
