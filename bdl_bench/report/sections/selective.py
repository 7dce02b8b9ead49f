"""Selective prediction: the error rate if a method answers only its most confident rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.per_example import top_labels
from bdl_bench.metrics.selective import risk_coverage
from bdl_bench.report.arrays import ArrayView
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.risk_coverage import risk_coverage_figures
from bdl_bench.report.sections.context import Context

__all__ = ["Selective", "selective"]

Floats = NDArray[np.float64]
_GRID = np.linspace(0.02, 1.0, 50)


@dataclass(frozen=True)
class Selective:
    """One figure per family of methods."""

    template: ClassVar[str] = "selective.html"
    pictures: list[Picture]
    tuned: bool


def selective(context: Context) -> Selective | None:
    """Return risk–coverage curves of a classifier; None for a regression, which may have one variance for all rows."""
    results = context.results
    if results.kind == "regression":
        return None
    tuned = results.all_tuned
    risks = {m: [_risk(results.predictions(m, s, tuned=tuned)) for s in results.finished[m]] for m in results.methods}
    curves = {m: (_GRID, np.mean(found, axis=0)) for m, found in risks.items()}  # means over seeds
    return Selective(context.render(risk_coverage_figures(curves, context.palette, risk="selective error")), tuned)


def _risk(arrays: ArrayView) -> Floats:
    """Return the error rate of the most confident rows at the coverages of the grid."""
    found = top_labels(arrays)
    curve = risk_coverage(found.log_odds.reshape(-1), 1 - found.correct.reshape(-1))
    risk: Floats = curve.selective_risk[np.clip(np.ceil(_GRID * len(curve.coverage)).astype(int) - 1, 0, None)]
    return risk
