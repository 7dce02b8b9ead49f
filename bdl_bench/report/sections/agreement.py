"""Agreement with linearized Laplace: numbers, a scatter plot per method, and the largest disagreements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import REFERENCE
from bdl_bench.metrics import worst_points
from bdl_bench.report.figures.canvas import BAD, Drawing, Margins, diagonal, log_axis, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.palette import Style
from bdl_bench.report.reference_agreement import AgreementRow, agreement_rows
from bdl_bench.report.sections.context import Context

__all__ = ["AgreementSection", "Disagreement", "agreement"]

Floats = NDArray[np.float64]
_MARKED = 3  # outputs per method
_POINTS = 300


@dataclass(frozen=True)
class Disagreement:
    """Both variances at an output of one seed at which their ratio is far from 1."""

    row: int
    output: int
    variance: float
    exact: float


@dataclass(frozen=True)
class AgreementSection:
    """Agreement of every method; `rows` is empty if the reference was not run, or if methods choose training rows."""

    template: ClassVar[str] = "agreement.html"
    reference: str
    rows: list[AgreementRow]
    seed: int
    pictures: list[Picture]
    largest: dict[str, list[Disagreement]]


def agreement(context: Context) -> AgreementSection:
    """Return numbers over all seeds, and figures of the first seed that a method shares with the reference."""
    results = context.results
    rows = [] if results.own_training_rows else agreement_rows(results, context.design)
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


def scatter(method: str, style: Style, variance: Floats, exact: Floats, *, marked: list[int]) -> Drawing | None:
    """Draw logarithmic axes with circles at the flat indices in `marked`; None if no variance is positive."""
    x, y = np.sqrt(exact.reshape(-1)), np.sqrt(np.maximum(variance.reshape(-1), 0.0))
    positive = np.flatnonzero((y > 0) & (x > 0))
    if not len(positive):
        return None
    chosen = positive
    if len(positive) > _POINTS:
        chosen = np.random.default_rng(0).choice(positive, _POINTS, replace=False)
    ringed = [i for i in marked if x[i] > 0 and y[i] > 0]
    with panel("exact std", "std of the method", margins=Margins(left=0.64)) as axes:
        low, high = float(x[positive].min()) / 1.1, float(x[positive].max()) * 1.1
        bottom, top = np.quantile(y[positive], (0.002, 0.998))
        diagonal(axes, low, high)
        axes.plot(*_dots(x[chosen], y[chosen]), color=style.colour, alpha=0.5, lw=2, solid_capstyle="round")
        axes.scatter(x[ringed], y[ringed], s=18, facecolors="none", edgecolors=BAD, linewidths=0.8)
        log_axis(axes, "x", low, high, most=60)
        log_axis(axes, "y", min(low, bottom / 1.15), max(high, top * 1.15), most=60)
    words = f"Standard deviation of {method} against the exact one, {len(chosen)} outputs"
    return Drawing.of(axes, f"agreement {method}", method, words)


def _dots(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return the points as strokes of zero length with round ends: one path is a tenth of the size of markers."""
    gaps = np.full_like(x, np.nan)
    return np.stack([x, x * (1 + 1e-9), gaps], 1).reshape(-1), np.stack([y, y, gaps], 1).reshape(-1)
