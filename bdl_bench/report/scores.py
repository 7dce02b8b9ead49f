"""The table of metrics of one task: means with intervals over seeds, compared with the baseline and with the best."""

from __future__ import annotations

from dataclasses import dataclass

from bdl_bench.methods import BASELINE
from bdl_bench.metrics import Metric
from bdl_bench.report.results import TaskResults
from bdl_bench.stats import (
    Interval,
    Verdict,
    best_group,
    bootstrap_difference,
    mean_interval,
    paired_interval,
    verdict,
)

__all__ = ["ScoreCell", "ScoreTable", "score_table"]


@dataclass(frozen=True)
class ScoreCell:
    """One metric of one method; `against` is None for the baseline itself and where no direction is better."""

    interval: Interval
    against: Verdict | None
    in_best_group: bool


@dataclass(frozen=True)
class ScoreTable:
    """Columns are metrics, rows methods: `cells[method][key]`."""

    metrics: tuple[Metric, ...]
    cells: dict[str, dict[str, ScoreCell]]
    best: dict[str, str]
    """The method with the best mean, by metric key, where a direction is better."""


def score_table(results: TaskResults) -> ScoreTable:
    """Every metric of every finished method of a task."""
    cells: dict[str, dict[str, ScoreCell]] = {method: {} for method in results.methods}
    best: dict[str, str] = {}
    for metric in results.metrics:
        means = {m: mean_interval(results.values(m, metric.key)) for m in results.methods}
        group: set[str] = set()
        if metric.better is not None:
            sign = 1 if metric.better == "lower" else -1
            best[metric.key] = min(means, key=lambda m: sign * means[m].mean)
            group = _group(results, metric, {m: i.mean for m, i in means.items()}, best[metric.key])
        for method, interval in means.items():
            against = _compared(results, metric, method, BASELINE) if method != BASELINE else None
            cells[method][metric.key] = ScoreCell(interval, against, method in group)
    return ScoreTable(results.metrics, cells, best)


def _group(results: TaskResults, metric: Metric, means: dict[str, float], best: str) -> set[str]:
    verdicts = {m: _compared(results, metric, m, best) or "unknown" for m in means if m != best}
    return best_group(means, verdicts, best)


def _compared(results: TaskResults, metric: Metric, method: str, other: str) -> Verdict | None:
    """The verdict on method against other over the seeds that both have; None where there is nothing to compare."""
    seeds = results.shared_seeds(method, other)
    if metric.better is None or not seeds:
        return None
    if metric.scores is not None:
        pair = [[metric.scores(results.arrays(name, seed)) for seed in seeds] for name in (method, other)]
        return verdict(bootstrap_difference(*pair), metric.better)
    values = [[results.done[name][seed].metrics[metric.key] for seed in seeds] for name in (method, other)]
    return verdict(paired_interval(*values), metric.better)
