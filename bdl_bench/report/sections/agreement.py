"""Agreement with the exact variance: numbers, a scatter a method, and the outputs that agree least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import REFERENCE
from bdl_bench.metrics import worst_points
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.scatter import scatter
from bdl_bench.report.reference_agreement import AgreementRow, agreement_rows
from bdl_bench.report.sections.context import Context

__all__ = ["AgreementSection", "WorstPoint", "agreement"]

Floats = NDArray[np.float64]
_WORST = 3


@dataclass(frozen=True)
class WorstPoint:
    """An output (row, output) of one seed where variance/exact is far from one; both variances."""

    row: int
    output: int
    variance: float
    exact: float


@dataclass(frozen=True)
class AgreementSection:
    """`rows` is empty where the reference was not run."""

    template: ClassVar[str] = "agreement.html"
    reference: str
    rows: list[AgreementRow]
    seed: int
    pictures: list[Picture]
    worst: dict[str, list[WorstPoint]]


def agreement(context: Context) -> AgreementSection:
    """Over all seeds in numbers; points of the first seed that the method shares with the reference."""
    results = context.results
    rows = agreement_rows(results)
    drawings: list[Drawing | None] = []
    worst: dict[str, list[WorstPoint]] = {}
    for row in rows:
        seed = results.shared_seeds(row.method, REFERENCE)[0]
        variance, exact = (results.arrays(name, seed)["epistemic_variance"] for name in (row.method, REFERENCE))
        worst[row.method] = points = _worst(variance, exact)
        places = [point.row * exact.shape[-1] + point.output for point in points]
        drawings.append(scatter(row.method, context.palette[row.method], variance, exact, worst=places))
    seed = results.shared_seeds(REFERENCE, REFERENCE)[0] if rows else results.seeds[0]
    return AgreementSection(REFERENCE, rows, seed, context.show(drawings), {m: w for m, w in worst.items() if w})


def _worst(variance: Floats, exact: Floats) -> list[WorstPoint]:
    """None for a variance that is zero throughout: all outputs agree equally little."""
    if not variance.any():
        return []
    places = worst_points(variance, exact, k=_WORST).indices
    return [WorstPoint(int(r), int(c), float(variance[r, c]), float(exact[r, c])) for r, c in places]
