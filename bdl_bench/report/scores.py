"""The table of metrics of one task: means with intervals over seeds, compared with the baseline and with the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import BASELINE
from bdl_bench.metrics import Metric
from bdl_bench.report.results import TaskResults, Variant
from bdl_bench.stats import (
    Interval,
    Verdict,
    bootstrap_differences,
    mean_interval,
    not_significantly_worse,
    paired_interval,
    verdict,
)

__all__ = ["ScoreCell", "ScoreTable", "score_table"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreCell:
    """One metric of one method; `against` is None for the baseline itself and where no direction is better."""

    interval: Interval
    against: Verdict | None
    in_best_group: bool


@dataclass(frozen=True)
class ScoreTable:
    """Columns are metrics, rows methods: `cells[method][key]`, without an entry where a method has no such number."""

    metrics: tuple[Metric, ...]
    cells: dict[str, dict[str, ScoreCell]]
    best: dict[str, str]
    """The method with the best mean of those with every seed, by metric key, where a direction is better."""
    tuned: Variant = False

    def columns(self, *prefixes: str) -> list[Metric]:
        """The metrics whose keys begin so."""
        return [metric for metric in self.metrics if metric.key.startswith(prefixes)]


def score_table(results: TaskResults, methods: Sequence[str], *, tuned: Variant = False) -> ScoreTable:
    """Every metric of these methods of a task."""
    cells: dict[str, dict[str, ScoreCell]] = {method: {} for method in methods}
    best: dict[str, str] = {}
    metrics = results.metrics
    for metric in metrics:
        values = {m: results.values(m, metric.key, tuned=tuned) for m in methods}
        means = {m: mean_interval(found) for m, found in values.items() if found}
        group: set[str] = set()
        comparison = _Comparison(results, metric, list(means), tuned)
        if metric.better is not None and means:
            sign = 1 if metric.better == "lower" else -1
            complete = [m for m in means if m in results.complete_methods] or list(means)
            best[metric.key] = min(complete, key=lambda m: sign * means[m].mean)
            verdicts = comparison.with_method(best[metric.key])
            known = {m: verdicts.get(m) or "unknown" for m in means if m != best[metric.key]}
            group = not_significantly_worse({m: i.mean for m, i in means.items()}, known, best[metric.key])
        against = comparison.with_method(BASELINE)
        for method, interval in means.items():
            cells[method][metric.key] = ScoreCell(interval, against.get(method), method in group)
    shown = tuple(metric for metric in metrics if any(metric.key in row for row in cells.values()))
    return ScoreTable(shown, cells, best, tuned)


@dataclass(frozen=True)
class _Comparison:
    """A metric of several methods, each against one of them, over the seeds that both have."""

    results: TaskResults
    metric: Metric
    methods: list[str]
    tuned: Variant
    _kept: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def with_method(self, other: str) -> dict[str, Verdict]:
        """The verdicts on all others; none where no direction is better or no seed is shared."""
        found: dict[str, Verdict] = {}
        if self.metric.better is None or other not in self.methods:
            return found
        for seeds, methods in self._by_seeds(other).items():
            for method, difference in zip(methods, self._differences(methods, other, seeds), strict=True):
                found[method] = verdict(difference, self.metric.better)
        return found

    def _by_seeds(self, other: str) -> dict[tuple[int, ...], list[str]]:
        groups: dict[tuple[int, ...], list[str]] = {}
        for method in self.methods:
            seeds = tuple(self.results.shared_seeds(method, other))
            if method != other and seeds:
                groups.setdefault(seeds, []).append(method)
        return groups

    def _differences(self, methods: list[str], other: str, seeds: Iterable[int]) -> list[Interval]:
        seeds = list(seeds)
        if self.metric.scores is None:
            return [paired_interval(self._values(m, seeds), self._values(other, seeds)) for m in methods]
        return bootstrap_differences(
            [
                np.stack([self._scores(m, seed) for m in methods], axis=1) - self._scores(other, seed)[:, None]
                for seed in seeds
            ]
        )

    def _values(self, method: str, seeds: list[int]) -> list[float]:
        return [self.results.measured(method, seed, tuned=self.tuned)[self.metric.key] for seed in seeds]

    def _scores(self, method: str, seed: int) -> Floats:
        place = (method, seed)
        if place not in self._kept:
            assert self.metric.scores is not None
            self._kept[place] = self.metric.scores(self.results.predictions(method, seed, tuned=self.tuned).rows())
        return self._kept[place]
