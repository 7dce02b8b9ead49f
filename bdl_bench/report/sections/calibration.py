"""Reliability diagrams of classifiers and coverage of regression intervals, one panel per method."""

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

    def panel(method: str) -> Drawing:
        style, arrays, tuned_arrays = context.palette[method], untuned[method], tuned.get(method)
        if results.kind == "regression":
            return coverage(method, style, arrays, tuned=tuned_arrays)
        return reliability(method, style, arrays, tuned=tuned_arrays, start=start)

    return Calibration(results.kind, context.render(map(panel, results.methods)), bool(tuned))
