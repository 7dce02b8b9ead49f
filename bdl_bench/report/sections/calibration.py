"""Calibration of each method: coverage of regression intervals, and reliability diagrams of classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from bdl_bench.metrics.calibration import Bins, equal_mass_bins
from bdl_bench.metrics.per_example import top_labels
from bdl_bench.report.figures.canvas import SOFT, Drawing, diagonal, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.palette import Style
from bdl_bench.report.sections.context import Context

__all__ = ["Calibration", "calibration"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
_LEVELS = np.linspace(0.02, 0.98, 49)
_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """One panel per method, with all seeds pooled."""

    template: ClassVar[str] = "calibration.html"
    kind: str
    pictures: list[Picture]
    tuned: bool


def calibration(context: Context) -> Calibration:
    """Return one panel per method: tuned with the untuned line in grey, if the method was tuned."""
    results = context.results
    untuned = {m: results.pooled(m) for m in results.methods}
    tuned = {m: results.pooled(m, tuned=True) for m in results.tuned_methods}
    start = 0.0 if results.kind == "regression" else first_confidence([*untuned.values(), *tuned.values()])

    def draw(method: str) -> Drawing:
        repeats = context.design.repeats
        style, arrays, tuned_arrays = context.palette[method], untuned[method], tuned.get(method)
        if results.kind == "regression":
            return coverage(method, style, arrays, tuned=tuned_arrays, repeats=repeats)
        return reliability(method, style, arrays, tuned=tuned_arrays, start=start, repeats=repeats)

    return Calibration(results.kind, context.render(map(draw, results.methods)), bool(tuned))


def coverage(method: str, style: Style, arrays: Arrays, *, tuned: Arrays | None, repeats: float = 1.0) -> Drawing:
    """Draw observed against nominal coverage with 95 % Wilson intervals; if tuned, the untuned line in grey.

    The intervals count a row once that occurs in several seeds: `repeats` times on average.
    """
    shown = arrays if tuned is None else tuned
    observed = coverages(shown, _LEVELS)
    count = np.full(len(_LEVELS), shown["targets"].size / repeats)
    low, high = Bins(confidence=_LEVELS, accuracy=observed, count=count).interval()
    with panel("nominal coverage", "observed coverage") as axes:
        diagonal(axes, 0.0, 1.0)
        if tuned is not None:
            axes.plot(_LEVELS, coverages(arrays, _LEVELS), color=SOFT, lw=1.1)
        axes.fill_between(_LEVELS, low, high, color=style.colour, alpha=0.18, lw=0)
        axes.plot(_LEVELS, observed, color=style.colour, lw=1.5)
        axes.set_xlim(0, 1.0)
        axes.set_ylim(0, 1.02)
        axes.set_xticks((0, 0.5, 1))
        axes.set_yticks((0, 0.5, 1))
    pairs = ", ".join(
        f"{level:.2f}: {fraction:.2f}" for level, fraction in zip(_LEVELS[4::10], observed[4::10], strict=True)
    )
    words = f"Coverage of {method}{'' if tuned is None else ', tuned'}; nominal: observed {pairs}"
    return Drawing.of(axes, f"coverage {method}", method, words)


def coverages(arrays: Arrays, levels: Floats) -> Floats:
    """Return, for each level, the fraction of |y − mean| / std within the normal quantile."""
    z = np.abs(arrays["targets"] - arrays["mean"]) / np.sqrt(arrays["total_variance"])
    ordered = np.sort(z.reshape(-1))
    fractions: Floats = np.searchsorted(ordered, norm.ppf(0.5 + levels / 2), side="right") / len(ordered)
    return fractions


def reliability(
    method: str, style: Style, arrays: Arrays, *, tuned: Arrays | None, start: float, repeats: float = 1.0
) -> Drawing:
    """Draw accuracy against confidence in ten bins of equal mass with 95 % Wilson intervals; untuned in grey.

    The intervals count a row once that occurs in several seeds: `repeats` times on average.
    """
    shown = top_label_bins(arrays if tuned is None else tuned)
    with panel("confidence", "accuracy") as axes:
        diagonal(axes, start, 1.0)
        if tuned is not None:
            before = top_label_bins(arrays)
            axes.plot(before.confidence, before.accuracy, color=SOFT, lw=1.1)
        low, high = replace(shown, count=shown.count / repeats).interval()
        axes.vlines(shown.confidence, low, high, color=style.colour, lw=0.9, alpha=0.55)
        axes.plot(shown.confidence, shown.accuracy, color=style.colour, lw=1.4, marker="o", ms=2.6)
        axes.set_xlim(start, 1.015)
        axes.set_ylim(start, 1.03)
    pairs = ", ".join(f"{c:.2f}: {a:.2f}" for c, a in zip(shown.confidence, shown.accuracy, strict=True))
    words = f"Reliability of {method}{'' if tuned is None else ', tuned'}; confidence: accuracy {pairs}"
    return Drawing.of(axes, f"reliability {method}", method, words)


def first_confidence(pooled: Sequence[Arrays]) -> float:
    """Return the start of a common axis of confidence: below every bin of every method, rounded down to a tenth."""
    lowest = min(min(b.confidence.min(), b.accuracy.min()) for b in map(top_label_bins, pooled))
    return max(0.0, float(np.floor(lowest * 10 - 0.2) / 10))


def top_label_bins(arrays: Arrays) -> Bins:
    """Return ten bins of equally many rows by the confidence of the predicted class."""
    found = top_labels(arrays)
    confidence, log_odds, correct = (values.reshape(-1) for values in found)
    return equal_mass_bins(confidence, correct, log_odds, n_bins=_BINS)
