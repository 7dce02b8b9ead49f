"""The table of metrics of one task: means with intervals over seeds, compared with the baseline and with the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import BASELINE
from bdl_bench.metrics import Metric
from bdl_bench.report.results import TaskResults
from bdl_bench.stats import (
    Interval,
    Verdict,
    bootstrap_differences,
    mean_interval,
    not_significantly_worse,
    paired_interval,
    verdicts,
)

__all__ = ["ScoreEntry", "ScoreTable", "score_table"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreEntry:
    """One metric of one method.

    `against_baseline` is None for the baseline, and for metrics of which neither direction is better.
    """

    interval: Interval
    against_baseline: Verdict | None
    not_worse_than_best: bool


@dataclass(frozen=True)
class ScoreTable:
    """Metrics (columns) of methods (rows): `entries[method][key]`, without an entry if a method lacks the metric.

    `best` is the method with the best mean, by metric key, among the methods that finished every seed.
    """

    metrics: tuple[Metric, ...]
    entries: dict[str, dict[str, ScoreEntry]]
    best: dict[str, str]
    tuned: bool = False

    @property
    def variant(self) -> str:
        """The name of the variant in tables and files."""
        return "tuned" if self.tuned else "untuned"

    def columns(self, *prefixes: str) -> list[Metric]:
        """Return the metrics whose keys begin with one of the prefixes."""
        return [metric for metric in self.metrics if metric.key.startswith(prefixes)]


def score_table(results: TaskResults, methods: Sequence[str], *, tuned: bool = False) -> ScoreTable:
    """Return every metric of these methods of a task."""
    entries: dict[str, dict[str, ScoreEntry]] = {method: {} for method in methods}
    best: dict[str, str] = {}
    metrics = results.metrics
    for metric in metrics:
        values = {m: results.values(m, metric.key, tuned=tuned) for m in methods}
        means = {m: mean_interval(found) for m, found in values.items() if found}
        comparison = _Comparison(results, metric, list(means), tuned)
        bold: set[str] = set()
        if metric.better is not None and means:
            sign = 1 if metric.better == "lower" else -1
            complete = [m for m in means if m in results.complete_methods] or list(means)
            best[metric.key] = min(complete, key=lambda m: sign * means[m].mean)
            found = comparison.with_method(best[metric.key])
            against_best = {m: found.get(m, "unknown") for m in means if m != best[metric.key]}
            bold = not_significantly_worse(against_best, best[metric.key])
        against = comparison.with_method(BASELINE)
        for method, interval in means.items():
            entries[method][metric.key] = ScoreEntry(interval, against.get(method), method in bold)
    shown = tuple(metric for metric in metrics if any(metric.key in row for row in entries.values()))
    return ScoreTable(shown, entries, best, tuned)


@dataclass(frozen=True)
class _Comparison:
    """Comparisons of several methods with one of them by one metric, over the seeds that both have."""

    results: TaskResults
    metric: Metric
    methods: list[str]
    tuned: bool
    _row_scores: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def with_method(self, other: str) -> dict[str, Verdict]:
        """Return the verdicts on all other methods that share a seed; none if neither direction is better."""
        if self.metric.better is None or other not in self.methods:
            return {}
        differences: dict[str, Interval] = {}
        for seeds, methods in self._methods_by_seeds(other).items():
            differences |= zip(methods, self._differences(methods, other, seeds), strict=True)
        return verdicts(differences, self.metric.better)

    def _methods_by_seeds(self, other: str) -> dict[tuple[int, ...], list[str]]:
        """Group the methods by the seeds that they share with `other`: one bootstrap serves a group."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for method in self.methods:
            seeds = tuple(self.results.shared_seeds(method, other))
            if method != other and seeds:
                groups.setdefault(seeds, []).append(method)
        return groups

    def _differences(self, methods: list[str], other: str, seeds: Iterable[int]) -> list[Interval]:
        """Bootstrap if the metric is a mean over rows, else use Student's t over seeds."""
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
        return [self.results.metric_values(method, seed, tuned=self.tuned)[self.metric.key] for seed in seeds]

    def _scores(self, method: str, seed: int) -> Floats:
        run = (method, seed)
        if run not in self._row_scores:
            assert self.metric.scores is not None
            predictions = self.results.predictions(method, seed, tuned=self.tuned).test_and_validation()
            self._row_scores[run] = self.metric.scores(predictions)
        return self._row_scores[run]
