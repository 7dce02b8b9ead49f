"""Selective prediction: the error rate if a method answers only its most confident rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.per_example import top_labels
from bdl_bench.metrics.selective import risk_coverage
from bdl_bench.report.arrays import ArrayView
from bdl_bench.report.figures.canvas import GUIDE, Drawing, Margins, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import stacked
from bdl_bench.report.palette import Palette
from bdl_bench.report.sections.context import Context

__all__ = ["Selective", "selective"]

Floats = NDArray[np.float64]
_GRID = np.linspace(0.02, 1.0, 50)
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


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


def risk_coverage_figures(curves: Mapping[str, Curve], palette: Palette, *, risk: str) -> list[Drawing]:
    """Draw one figure per family: its methods in colour, all others in grey; `curves` are (coverage, risk)."""
    top = 1.08 * max(float(r[c >= 0.1].max()) for c, r in curves.values()) or 1.0
    drawings = []
    for family, members in palette.families(curves).items():
        room = 1 + 0.13 * len(members)
        with panel("coverage", risk, size=(2.4, 2.1), margins=Margins(left=0.56)) as axes:
            for method in (m for m in curves if m not in members):
                axes.plot(*curves[method], color=GUIDE, lw=0.7, zorder=1)
            for method in members:
                style = palette[method]
                axes.plot(*curves[method], color=style.colour, ls=style.dash, lw=1.4, zorder=3)
            axes.set_xlim(0, 1.0)
            axes.set_ylim(0, top * room)
            axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "¼", "½", "¾", "1"))
            stacked(axes, members, palette)
        words = f"Risk against coverage of {', '.join(members)}; at half coverage: " + ", ".join(
            f"{m} {np.interp(0.5, *curves[m]):.3g}" for m in members
        )
        drawings.append(Drawing.of(axes, f"risk-coverage {family}", family, words))
    return drawings
