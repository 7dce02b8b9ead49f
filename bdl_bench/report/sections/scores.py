"""Metrics of the test rows, as fitted and tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdl_bench.metrics import Metric
from bdl_bench.report.scores import ScoreTable, score_table
from bdl_bench.report.sections.context import Context

__all__ = ["Scores", "scores"]


@dataclass(frozen=True)
class Scores:
    """The tables; `tuned` None where no method was tuned."""

    template: ClassVar[str] = "scores.html"
    fitted: ScoreTable
    tuned: ScoreTable | None
    seeds: int
    incomplete: dict[str, int]
    """Finished seeds of methods that miss some."""

    @property
    def tables(self) -> list[ScoreTable]:
        """Those that there are."""
        return [self.fitted] if self.tuned is None else [self.fitted, self.tuned]

    @property
    def fair(self) -> ScoreTable:
        """The table to compare methods by: tuned where every method was, else as fitted."""
        return (
            self.tuned
            if self.tuned is not None and self.tuned.cells.keys() == self.fitted.cells.keys()
            else self.fitted
        )

    @property
    def first(self) -> Metric:
        """The metric that a task is summed up by."""
        return self.fitted.metrics[0]


def scores(context: Context) -> Scores:
    """Always there: a task has at least one finished cell."""
    results = context.results
    tuned = results.tuned_methods
    return Scores(
        score_table(results, results.methods),
        score_table(results, tuned, tuned=True) if tuned else None,
        len(results.seeds),
        {m: len(s) for m, s in results.done.items() if len(s) < len(results.seeds)},
    )
