"""The table of metrics of one task: means with intervals over seeds, compared with the baseline and with the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import BASELINE
from bdl_bench.metrics import Metric
from bdl_bench.metrics.contributions import row_contributions
from bdl_bench.report.formatting import mean_and_half_width
from bdl_bench.report.results import TaskResults
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.stats import (
    Comparisons,
    Interval,
    Verdict,
    compare_methods,
    intervals_over_seeds,
    is_tie,
    not_significantly_worse,
)

__all__ = ["ScoreEntry", "ScoreTable", "score_table"]

Floats = NDArray[np.float64]
_FOLDABLE = ("cls/", "reg/", "cal/", "sc/", "cov/", "cp/", "width/", "ood/")


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

    `best` is the method with the best finite mean by metric key, of the methods that finished every seed. `tests` has
    the comparisons of the methods, and `relevant` the smallest relevant difference, by metric key.
    """

    metrics: tuple[Metric, ...]
    entries: dict[str, dict[str, ScoreEntry]]
    best: dict[str, str]
    tuned: bool = False
    tests: dict[str, Comparisons] = field(default_factory=dict)
    relevant: dict[str, float] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """The name of the variant in tables and files."""
        return "tuned" if self.tuned else "untuned"

    def tied_with_best(self, key: str) -> list[str]:
        """Return the other methods whose mean differs from the best one by round-off at most."""
        top = self.entries[self.best[key]][key].interval.mean
        return [m for m, mean in self._other_means(key).items() if is_tie(mean, top)]

    def near_best(self, key: str) -> list[str]:
        """Return the other methods whose mean is nearer to the best one than the smallest relevant difference."""
        top, tied = self.entries[self.best[key]][key].interval.mean, self.tied_with_best(key)
        smallest = self.relevant.get(key, 0.0)
        return [m for m, mean in self._other_means(key).items() if abs(mean - top) < smallest and m not in tied]

    def _other_means(self, key: str) -> dict[str, float]:
        return {m: row[key].interval.mean for m, row in self.entries.items() if m != self.best[key] and key in row}

    def columns(self, *prefixes: str) -> list[Metric]:
        """Return the metrics whose key begins with one of the prefixes, such as "cls/", or is one of the whole keys."""
        whole = {key for key in prefixes if not key.endswith("/")}
        begin = tuple(key for key in prefixes if key.endswith("/"))
        return [metric for metric in self.metrics if metric.key in whole or metric.key.startswith(begin)]

    def shown(self, *prefixes: str) -> list[Metric]:
        """Return the columns that tell methods apart: without those that are constant or equal to an earlier one."""
        folded = self.folded(*prefixes)
        return [metric for metric in self.columns(*prefixes) if metric.key not in folded]

    def folded(self, *prefixes: str) -> dict[str, str]:
        """Return what the columns that a table leaves out say, in words, by key.

        A column is left out if every method has the same mean in it, or if it equals an earlier column. The first
        column is never left out, nor a metric of a plugin, nor any column of a single method.
        """
        found: dict[str, str] = {}
        kept: dict[tuple[tuple[str, ...], ...], str] = {}
        for metric in self.columns(*prefixes) if len(self.entries) > 1 else []:
            texts = tuple(self._text(method, metric.key) for method in self.entries)
            means = {text[0] for text in texts}
            if not metric.key.startswith(_FOLDABLE):
                continue
            if texts in kept:
                found[metric.key] = f"{metric.label} equals {kept[texts]}"
            elif len(means) == 1 and kept:
                found[metric.key] = f"{metric.label} is {means.pop()} for every method"
            else:
                kept[texts] = metric.label
        return found

    def _text(self, method: str, key: str) -> tuple[str, ...]:
        entry = self.entries[method].get(key)
        return ("–",) if entry is None else mean_and_half_width(entry.interval)


def score_table(results: TaskResults, design: SeedDesign, methods: Sequence[str], *, tuned: bool = False) -> ScoreTable:
    """Return every metric of these methods of a task.

    Args:
        results: the runs of the task.
        design: how its seeds differ.
        methods: the rows of the table.
        tuned: whether of the tuned or of the untuned estimators.

    Returns:
        The table.
    """
    contributions = _Contributions(results, design, tuned)
    entries: dict[str, dict[str, ScoreEntry]] = {method: {} for method in methods}
    best: dict[str, str] = {}
    tests: dict[str, Comparisons] = {}
    relevant: dict[str, float] = {}
    for metric in results.metrics:
        values = {m: found for m in methods if (found := contributions.of(m, metric))}
        means = {m: _interval(found, design, m) for m, found in values.items()}
        bold: set[str] = set()
        if metric.better is not None and means:
            relevant[metric.key] = _smallest_relevant(metric, means)
            tests[metric.key] = compare_methods(
                values,
                metric.better,
                same_rows=design.same_rows,
                baseline=BASELINE,
                copies=design.copies,
                smallest_relevant=relevant[metric.key],
            )
            top = _best(metric, means, results.complete_methods)
            if top is not None:
                best[metric.key] = top
                verdicts = tests[metric.key].with_method(top)
                bold = not_significantly_worse({m: verdicts.get(m, "unknown") for m in means if m != top}, top)
        against = tests[metric.key].with_baseline if metric.key in tests else {}
        for method, interval in means.items():
            entries[method][metric.key] = ScoreEntry(interval, against.get(method), method in bold)
    shown = tuple(metric for metric in results.metrics if any(metric.key in row for row in entries.values()))
    return ScoreTable(shown, entries, best, tuned, tests, relevant)


def _best(metric: Metric, means: Mapping[str, Interval], complete: Sequence[str]) -> str | None:
    """Return the method with the best finite mean, of the complete ones if possible; None if no mean is finite."""
    sign = 1 if metric.better == "lower" else -1
    finite = [m for m, found in means.items() if np.isfinite(found.mean)]
    candidates = [m for m in finite if m in complete] or finite
    return min(candidates, key=lambda m: sign * means[m].mean, default=None)


def _smallest_relevant(metric: Metric, means: Mapping[str, Interval]) -> float:
    """Return the smallest relevant difference of a metric, at the value of the baseline or else the median."""
    values = [means[BASELINE].mean] if BASELINE in means else [found.mean for found in means.values()]
    finite = [value for value in values if np.isfinite(value)]
    return metric.smallest_relevant(float(np.median(finite))) if finite else 0.0


def _interval(values: Mapping[int, Floats], design: SeedDesign, method: str) -> Interval:
    """Return the mean over the distinct seeds of a method, with its interval."""
    seeds = design.distinct(values, [method])
    (found,) = intervals_over_seeds([values[seed][:, None] for seed in seeds], same_rows=design.same_rows)
    return found


@dataclass(frozen=True)
class _Contributions:
    """Contributions of the test rows to metrics of each run; only the metrics if the seeds have different rows."""

    results: TaskResults
    design: SeedDesign
    tuned: bool
    _arrays: dict[tuple[str, int], dict[str, Floats]] = field(default_factory=dict)

    def of(self, method: str, metric: Metric) -> dict[int, Floats]:
        """Return the contributions, (R,), by seed; empty if a seed has no such metric."""
        seeds = sorted(self.results.finished[method])
        values = self.results.values(method, metric.key, tuned=self.tuned)
        if not values or not self.design.same_rows or (metric.scores is None and metric.compute is None):
            return {seed: np.array([value]) for seed, value in zip(seeds, values, strict=bool(values))}
        return {seed: row_contributions(metric, self._in_common_order(method, seed)) for seed in seeds}

    def _in_common_order(self, method: str, seed: int) -> dict[str, Floats]:
        """Return the arrays of a run, with the test rows in the order of the first seed."""
        if (method, seed) not in self._arrays:
            found = self.results.predictions(method, seed, tuned=self.tuned).for_metrics()
            order = self.design.orders[seed]
            self._arrays[method, seed] = {n: a if "/" in n else a[order] for n, a in found.items()}
        return self._arrays[method, seed]
