"""Reliability diagrams of classes, coverage of regression intervals: one small panel a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.coverage import coverage
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.reliability import first_confidence, reliability
from bdl_bench.report.sections.context import Context

__all__ = ["Calibration", "calibration"]


@dataclass(frozen=True)
class Calibration:
    """Panels of all seeds together."""

    template: ClassVar[str] = "calibration.html"
    kind: str
    pictures: list[Picture]
    tuned: bool


def calibration(context: Context) -> Calibration:
    """One panel a method; tuned, with the line as fitted in grey, where there is a tuned estimator."""
    results = context.results
    fitted = {m: results.pooled(m) for m in results.methods}
    tuned = {m: results.pooled(m, tuned=True) for m in results.tuned_methods}
    start = 0.0 if results.kind == "regression" else first_confidence([*fitted.values(), *tuned.values()])

    def panel(method: str) -> Drawing:
        style, arrays, after = context.palette[method], fitted[method], tuned.get(method)
        if results.kind == "regression":
            return coverage(method, style, arrays, tuned=after)
        return reliability(method, style, arrays, tuned=after, start=start)

    return Calibration(results.kind, context.show(map(panel, results.methods)), bool(tuned))
