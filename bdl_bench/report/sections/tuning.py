"""What tuning tried, as curves and contours, and what it chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from bdl_bench.records.record import Record, Tuning
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.tuning import contours, tuning_curves
from bdl_bench.report.formatting import number
from bdl_bench.report.sections.context import Context
from bdl_bench.report.tuning_curves import SCALE, line, surface

__all__ = ["TuningRow", "TuningSection", "tuning"]


@dataclass(frozen=True)
class TuningRow:
    """What was chosen for a method, over seeds, and what that took."""

    method: str
    chosen: dict[str, str]
    at_boundary: list[str]
    failures: dict[str, str]
    points: float
    fits: float
    seconds: float
    where: str


@dataclass(frozen=True)
class TuningSection:
    """The table, curves by axis, and contours of axis × variance scale."""

    template: ClassVar[str] = "tuning.html"
    rows: list[TuningRow]
    score: str
    validation_rows: int
    curves: list[Picture]
    contours: list[Picture]

    @property
    def edges(self) -> list[TuningRow]:
        """Methods with a pick at the end of its range."""
        return [row for row in self.rows if row.at_boundary]


def tuning(context: Context) -> TuningSection | None:
    """None where nothing was tuned. Figures are of each method's first seed."""
    done = context.results.done
    tuned = {m: [r for r in seeds.values() if r.tuning is not None] for m, seeds in done.items()}
    first = {m: records[0].tuning for m, records in tuned.items() if records}
    found = {m: t for m, t in first.items() if t is not None}
    if not found:
        return None
    any_one = next(iter(found.values()))
    return TuningSection(
        [_row(m, records) for m, records in tuned.items() if records],
        any_one.score_name,
        any_one.validation_rows,
        context.show(_curves(context, found)),
        context.show(_contours(found)),
    )


def _row(method: str, records: list[Record]) -> TuningRow:
    tunings = [r.tuning for r in records if r.tuning is not None]
    names = list(dict.fromkeys(name for t in tunings for name, value in t.chosen.items() if value is not None))
    return TuningRow(
        method,
        {_named(name, tunings[0]): _values(t.chosen.get(name) for t in tunings) for name in names if name != "score"},
        sorted({_named(name, tunings[0]) for t in tunings for name in t.at_boundary}),
        {value: reason for t in tunings for value, reason in t.failures.items()},
        median(len(t.points) for t in tunings),
        median(t.fits for t in tunings),
        median(t.seconds for t in tunings),
        tunings[0].refit_kind,
    )


def _named(name: str, tuning: Tuning) -> str:
    return (tuning.option or name if name == "value" else name).replace("_", " ")


def _values(found: Iterable[float | None]) -> str:
    """One number where all seeds chose it, else from the least to the largest."""
    values = [v for v in found if v is not None]
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _curves(context: Context, tunings: dict[str, Tuning]) -> list[Drawing]:
    """One figure for each axis, and one over the variance scale."""
    axes = list(dict.fromkeys(t.option for t in tunings.values() if t.option is not None))
    by_axis = [(axis, "value", {m: t for m, t in tunings.items() if t.option == axis}) for axis in axes]
    drawings = []
    for axis, quantity, members in [*by_axis, (SCALE, SCALE, tunings)]:
        lines = {m: line(t, quantity) for m, t in members.items()}
        found = {m: drawn for m, drawn in lines.items() if drawn is not None}
        score = next(iter(tunings.values())).score_name
        if found:
            drawings.append(tuning_curves(f"tuning {axis}", axis.replace("_", " "), score, found, context.palette))
    return drawings


def _contours(tunings: dict[str, Tuning]) -> list[Drawing]:
    drawings = []
    for method, tuning in tunings.items():
        found = surface(tuning)
        if found is not None and tuning.option is not None:
            drawings.append(contours(method, tuning.option.replace("_", " "), tuning.score_name, found))
    return drawings
