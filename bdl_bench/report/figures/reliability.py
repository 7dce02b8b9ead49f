"""Reliability diagrams (Guo et al. 2017; McInerney and Kallus 2025, Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.calibration import Bins, equal_mass_bins
from bdl_bench.metrics.per_example import top_labels
from bdl_bench.report.figures.canvas import SOFT, Drawing, diagonal, panel
from bdl_bench.report.palette import Style

__all__ = ["first_confidence", "reliability"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
_BINS = 10


def reliability(method: str, style: Style, arrays: Arrays, *, tuned: Arrays | None, start: float) -> Drawing:
    """Draw accuracy against confidence in ten bins of equal mass with 95 % Wilson intervals; untuned in grey."""
    shown = top_label_bins(arrays if tuned is None else tuned)
    with panel("confidence", "accuracy") as axes:
        diagonal(axes, start, 1.0)
        if tuned is not None:
            before = top_label_bins(arrays)
            axes.plot(before.confidence, before.accuracy, color=SOFT, lw=1.1)
        low, high = shown.interval()
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
