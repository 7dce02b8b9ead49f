"""Coverage of central intervals at every level: the calibration curve of a regression (Kuleshov et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from bdl_bench.metrics.calibration import Bins
from bdl_bench.report.figures.canvas import SOFT, Drawing, diagonal, panel
from bdl_bench.report.palette import Style

__all__ = ["coverage"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
_LEVELS = np.linspace(0.02, 0.98, 49)


def coverage(method: str, style: Style, arrays: Arrays, *, tuned: Arrays | None) -> Drawing:
    """Draw observed against nominal coverage with 95 % Wilson intervals; if tuned, the untuned line in grey."""
    shown = arrays if tuned is None else tuned
    observed = coverages(shown, _LEVELS)
    count = np.full(len(_LEVELS), float(shown["targets"].size))
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
