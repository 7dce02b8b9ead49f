"""What tuning tried, as curves and contours, and what it chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.records import Record, Tuning
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.tuning import Line, Surface, contours, tuning_curves
from bdl_bench.report.sections.context import Context
from bdl_bench.report.text import number

__all__ = ["TuningRow", "TuningSection", "tuning"]

Floats = NDArray[np.float64]
Points = list[dict[str, float]]
_SCALE = "variance_scale"


@dataclass(frozen=True)
class TuningRow:
    """What was chosen for a method, over seeds, and what that took."""

    method: str
    axis: str
    chosen: dict[str, str]
    at_edge: list[str]
    points: float
    fits: float
    seconds: float
    where: str


@dataclass(frozen=True)
class TuningSection:
    """The table, curves by axis, and contours of axis × variance scale."""

    template: ClassVar[str] = "tuning.html"
    rows: list[TuningRow]
    seed: int
    score: str
    validation_rows: int
    curves: list[Picture]
    contours: list[Picture]

    @property
    def edges(self) -> list[TuningRow]:
        """Methods with a pick at the end of its range."""
        return [row for row in self.rows if row.at_edge]


def tuning(context: Context) -> TuningSection | None:
    """None where nothing was tuned. Figures are of each method's first seed."""
    results = context.results
    tuned = {m: [r for r in seeds.values() if r.tuning is not None] for m, seeds in results.done.items()}
    tuned = {m: records for m, records in tuned.items() if records}
    if not tuned:
        return None
    first = {m: r.tuning for m, records in tuned.items() if (r := records[0]).tuning is not None}
    any_one = next(iter(first.values()))
    return TuningSection(
        [_row(m, records) for m, records in tuned.items()],
        results.seeds[0],
        any_one.score_name,
        any_one.validation_rows,
        context.show(_curves(context, first)),
        context.show(_contours(first)),
    )


def _row(method: str, records: list[Record]) -> TuningRow:
    tunings = [r.tuning for r in records if r.tuning is not None]
    names = list(dict.fromkeys(name for t in tunings for name, value in t.chosen.items() if value is not None))
    return TuningRow(
        method,
        tunings[0].axis or "none",
        {_name(name, tunings[0]): _values(t.chosen.get(name) for t in tunings) for name in names},
        sorted({_name(name, tunings[0]) for t in tunings for name in t.at_edge}),
        median(len(t.points) for t in tunings),
        median(t.fits for t in tunings),
        median(t.seconds for t in tunings),
        tunings[0].where,
    )


def _name(name: str, tuning: Tuning) -> str:
    return (tuning.axis or name if name == "value" else name).replace("_", " ")


def _values(found: Iterable[float | None]) -> str:
    """One number where all seeds chose it, else from the least to the largest."""
    values = [v for v in found if v is not None]
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _curves(context: Context, tunings: dict[str, Tuning]) -> list[Drawing]:
    """One figure for each axis, and one over the variance scale."""
    drawings = []
    axes = list(dict.fromkeys(t.axis for t in tunings.values() if t.axis is not None))
    for axis in axes:
        lines = {m: _line(t, "value", axis) for m, t in tunings.items() if t.axis == axis}
        drawings.append(_curve_figure(context, axis, lines, tunings))
    lines = {m: _line(t, _SCALE, _SCALE) for m, t in tunings.items()}
    drawings.append(_curve_figure(context, _SCALE, lines, tunings))
    return [drawing for drawing in drawings if drawing is not None]


def _curve_figure(
    context: Context, axis: str, lines: dict[str, Line | None], tunings: dict[str, Tuning]
) -> Drawing | None:
    found = {m: line for m, line in lines.items() if line is not None}
    score = next(iter(tunings.values())).score_name
    return tuning_curves(f"tuning {axis}", axis.replace("_", " "), score, found, context.palette) if found else None


def _line(tuning: Tuning, quantity: str, axis: str) -> Line | None:
    """The best score at each value of a quantity; None for fewer than three values."""
    points = _finite(tuning, quantity)
    x = np.array(sorted({p[quantity] for p in points}))
    if len(x) < 3 or x[0] <= 0:
        return None
    best = np.array([min(p["score"] for p in points if p[quantity] == value) for value in x])
    return Line(x, best, at_edge=bool({quantity, axis} & set(tuning.at_edge)))


def _contours(tunings: dict[str, Tuning]) -> list[Drawing]:
    drawings = []
    for method, tuning in tunings.items():
        surface = _surface(tuning)
        if surface is not None and tuning.axis is not None:
            drawings.append(contours(method, tuning.axis.replace("_", " "), tuning.score_name, surface))
    return drawings


def _surface(tuning: Tuning) -> Surface | None:
    """The best score at each (value, scale); None for fewer than three of either."""
    points = [p for p in _finite(tuning, "value") if _SCALE in p]
    axis, scale = (np.array(sorted({p[name] for p in points})) for name in ("value", _SCALE))
    if min(len(axis), len(scale)) < 3 or min(axis[0], scale[0]) <= 0:
        return None
    score = np.full((len(axis), len(scale)), np.nan)
    for p in points:
        place = np.searchsorted(axis, p["value"]), np.searchsorted(scale, p[_SCALE])
        score[place] = np.fmin(score[place], p["score"])
    a, s = np.unravel_index(int(np.nanargmin(score)), score.shape)
    edge = bool({"value", _SCALE, tuning.axis} & set(tuning.at_edge))
    return Surface(axis, scale, score, (float(axis[a]), float(scale[s])), edge)


def _finite(tuning: Tuning, quantity: str) -> Points:
    """Points with a finite score and a value of that quantity."""
    whole = [{k: v for k, v in p.items() if v is not None} for p in tuning.points]
    return [p for p in whole if quantity in p and np.isfinite(p.get("score", np.nan))]
