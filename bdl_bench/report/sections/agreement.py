"""Agreement with the exact variance: numbers, a scatter plot per method, and the largest disagreements."""

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

__all__ = ["AgreementSection", "Disagreement", "agreement"]

Floats = NDArray[np.float64]
_MARKED = 3  # outputs per method


@dataclass(frozen=True)
class Disagreement:
    """Both variances at an output of one seed at which their ratio is far from 1."""

    row: int
    output: int
    variance: float
    exact: float


@dataclass(frozen=True)
class AgreementSection:
    """Agreement of every method; `rows` is empty if the reference was not run."""

    template: ClassVar[str] = "agreement.html"
    reference: str
    rows: list[AgreementRow]
    seed: int
    pictures: list[Picture]
    largest: dict[str, list[Disagreement]]


def agreement(context: Context) -> AgreementSection:
    """Return numbers over all seeds, and figures of the first seed that a method shares with the reference."""
    results = context.results
    rows = agreement_rows(results)
    drawings: list[Drawing | None] = []
    largest: dict[str, list[Disagreement]] = {}
    for row in rows:
        seed = results.shared_seeds(row.method, REFERENCE)[0]
        variance, exact = (results.arrays(name, seed)["epistemic_variance"] for name in (row.method, REFERENCE))
        largest[row.method] = outputs = _largest(variance, exact)
        marked = [output.row * exact.shape[-1] + output.output for output in outputs]
        drawings.append(scatter(row.method, context.palette[row.method], variance, exact, marked=marked))
    seed = results.shared_seeds(REFERENCE, REFERENCE)[0] if rows else results.seeds[0]
    return AgreementSection(REFERENCE, rows, seed, context.render(drawings), {m: w for m, w in largest.items() if w})


def _largest(variance: Floats, exact: Floats) -> list[Disagreement]:
    """Return the outputs with the largest disagreement; none if all variances are zero."""
    if not variance.any():
        return []
    indices = worst_points(variance, exact, k=_MARKED).indices
    return [Disagreement(int(r), int(c), float(variance[r, c]), float(exact[r, c])) for r, c in indices]
