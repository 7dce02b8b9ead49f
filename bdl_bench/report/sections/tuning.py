"""The trials of tuning as curves and contours, and the selected values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from bdl_bench.records.record import Record, Tuning
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.formatting import number
from bdl_bench.report.sections.context import Context
from bdl_bench.report.tuning_curves import SCALE, contours, line, score_grid, tuning_curves

__all__ = ["TuningRow", "TuningSection", "tuning"]


@dataclass(frozen=True)
class TuningRow:
    """The selected values of a method over seeds, and the cost of tuning (medians over seeds)."""

    method: str
    chosen: dict[str, str]
    at_boundary: list[str]
    failures: dict[str, str]
    trials: float
    fits: float
    seconds: float
    refit_kind: str


@dataclass(frozen=True)
class TuningSection:
    """The table, curves by tuned option, and contours of option × variance scale."""

    template: ClassVar[str] = "tuning.html"
    rows: list[TuningRow]
    score: str
    validation_rows: int
    curves: list[Picture]
    contours: list[Picture]

    @property
    def at_boundary(self) -> list[TuningRow]:
        """Methods with a selected value at the boundary of its range."""
        return [row for row in self.rows if row.at_boundary]


def tuning(context: Context) -> TuningSection | None:
    """Return tables over seeds and figures of the first seed of each method; None if no method was tuned."""
    finished = context.results.finished
    tuned = {m: [r for r in seeds.values() if r.tuning is not None] for m, seeds in finished.items()}
    first = {m: records[0].tuning for m, records in tuned.items() if records}
    found = {m: t for m, t in first.items() if t is not None}
    if not found:
        return None
    first_tuning = next(iter(found.values()))
    return TuningSection(
        [_row(m, records) for m, records in tuned.items() if records],
        first_tuning.score_name,
        first_tuning.validation_rows,
        context.render(_curves(context, found)),
        context.render(_contours(found)),
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
    """Return the value if it is the same for all seeds, else the range."""
    values = [v for v in found if v is not None]
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _curves(context: Context, tunings: dict[str, Tuning]) -> list[Drawing]:
    """Draw one figure per tuned option, and one over the variance scale."""
    options = list(dict.fromkeys(t.option for t in tunings.values() if t.option is not None))
    by_option = [(option, "value", {m: t for m, t in tunings.items() if t.option == option}) for option in options]
    drawings = []
    for option, quantity, members in [*by_option, (SCALE, SCALE, tunings)]:
        lines = {m: line(t, quantity) for m, t in members.items()}
        found = {m: drawn for m, drawn in lines.items() if drawn is not None}
        score = next(iter(tunings.values())).score_name
        if found:
            drawings.append(tuning_curves(f"tuning {option}", option.replace("_", " "), score, found, context.palette))
    return drawings


def _contours(tunings: dict[str, Tuning]) -> list[Drawing]:
    drawings = []
    for method, tuning in tunings.items():
        found = score_grid(tuning)
        if found is not None and tuning.option is not None:
            drawings.append(contours(method, tuning.option.replace("_", " "), tuning.score_name, found))
    return drawings
