"""Metrics of the test rows, untuned and tuned."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from bdl_bench.methods import BASELINE
from bdl_bench.metrics import Metric
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.forest import forest
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.scores import ScoreTable, score_table
from bdl_bench.report.sections.context import Context
from bdl_bench.report.seed_design import SeedDesign

__all__ = ["Scores", "scores"]

_TEST = ("cls/", "reg/", "cal/")
_ELSEWHERE = ("sc/", "cov/", "width/", "ood/", "shift/", "al/", "bo/", "dis/")
"""Beginnings of the keys of metrics that other sections show."""


@dataclass(frozen=True)
class Scores:
    """The tables of metrics; `tuned` is None if no method was tuned."""

    template: ClassVar[str] = "scores.html"
    design: SeedDesign
    untuned: ScoreTable
    tuned: ScoreTable | None
    seeds: int
    incomplete: dict[str, int]
    """The number of finished seeds of methods with missing seeds."""
    effects: list[Picture] = field(default_factory=list)
    """The differences from the baseline in the first metric; none without a baseline or an interval."""

    @property
    def tables(self) -> list[ScoreTable]:
        """The untuned table, and the tuned one if there is one."""
        return [self.untuned] if self.tuned is None else [self.untuned, self.tuned]

    @property
    def test_keys(self) -> tuple[str, ...]:
        """Prefixes of the metrics of test rows that have no section of their own, and the whole keys of other ones."""
        own = [m.key for m in self.untuned.metrics if not m.key.startswith((*_TEST, *_ELSEWHERE))]
        return *_TEST, *own

    @property
    def compared(self) -> ScoreTable:
        """The table by which methods are compared: tuned if every method was tuned, else untuned."""
        if self.tuned is not None and self.tuned.entries.keys() == self.untuned.entries.keys():
            return self.tuned
        return self.untuned

    @property
    def first(self) -> Metric:
        """The first metric, which represents the task in the summary."""
        return self.untuned.metrics[0]


def scores(context: Context) -> Scores:
    """Return the tables of a task."""
    results = context.results
    tuned = results.tuned_methods
    found = Scores(
        context.design,
        score_table(results, context.design, results.methods),
        score_table(results, context.design, tuned, tuned=True) if tuned else None,
        len(results.seeds),
        {m: len(s) for m, s in results.finished.items() if len(s) < len(results.seeds)},
    )
    return replace(found, effects=context.render([_effects(context, found)]))


def _effects(context: Context, found: Scores) -> Drawing | None:
    table, metric = found.compared, found.first
    tests = table.tests.get(metric.key)
    if tests is None:
        return None
    return forest(
        "effects",
        f"{metric.label} of each method − that of {BASELINE}",
        tests.baseline_differences,
        context.palette,
        verdicts=tests.with_baseline,
        label=f"difference in {metric.label}",
        lower_is_better=metric.better == "lower",
        relevant=table.relevant.get(metric.key, 0.0),
    )
