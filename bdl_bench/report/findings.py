"""The main results of a task, as sentences generated from its tables."""

from __future__ import annotations

from collections.abc import Iterable

from bdl_bench.methods import BASELINE
from bdl_bench.records.record import Training
from bdl_bench.report.formatting import join_names, number
from bdl_bench.report.reference_agreement import AgreementRow, CostRow
from bdl_bench.report.scores import ScoreTable
from estimators.runtime.units import in_seconds

__all__ = ["comparison_with_best", "findings", "overtuned", "trained_further"]


def findings(scores: ScoreTable, agreements: list[AgreementRow], costs: list[CostRow]) -> list[str]:
    """Return sentences on the first metric, the baseline, agreement with linearized Laplace, and the least time."""
    return [*_first_metric(scores), *_against_baseline(scores), *_closest(agreements), *_cheapest(costs, agreements)]


def trained_further(trainings: Iterable[Training | None]) -> list[str]:
    """Return a notice if the recipe trained a network further that came with trained weights."""
    found = [training for training in trainings if training is not None and training.further]
    if not found:
        return []
    return [
        f"The network came with trained weights and was trained further for {found[0].epochs} epochs, because the "
        "problem has a recipe. Problem(..., trained=True) uses the given weights."
    ]


def overtuned(untuned: ScoreTable, tuned: ScoreTable | None) -> list[str]:
    """Return a warning if tuning made the first metric of the test rows worse for most methods."""
    metric = untuned.metrics[0]
    if tuned is None or metric.better is None:
        return []
    sign = 1 if metric.better == "lower" else -1
    both = [m for m in tuned.entries if metric.key in tuned.entries[m] and metric.key in untuned.entries.get(m, {})]
    worse = [
        m
        for m in both
        if sign * (tuned.entries[m][metric.key].interval.mean - untuned.entries[m][metric.key].interval.mean) > 0
    ]
    if 2 * len(worse) <= len(both):
        return []
    return [
        f"Tuning made {metric.label} of the test rows worse for {len(worse)} of {len(both)} methods. With few "
        "validation rows, tuning overfits; compare with the untuned table."
    ]


def _first_metric(scores: ScoreTable) -> list[str]:
    metric = scores.metrics[0]
    if metric.key not in scores.best or len(scores.entries) < 2:
        return []
    best = scores.best[metric.key]
    value = number(scores.entries[best][metric.key].interval.mean)
    return [f"Best {metric.label}: {best} ({value}){comparison_with_best(scores)}."]


def comparison_with_best(scores: ScoreTable) -> str:
    """Return the end of a sentence on the best method: how the others compare with it by the first metric."""
    key = scores.metrics[0].key
    bold = [m for m, row in scores.entries.items() if key in row and row[key].not_worse_than_best]
    others = [m for m in bold if m != scores.best[key]]
    if others:
        return f"; not significantly worse: {join_names(others)}"
    return "; all others are significantly worse" if bold else "; no other method is significantly worse"


def _against_baseline(scores: ScoreTable) -> list[str]:
    metric = scores.metrics[0]
    if BASELINE not in scores.entries:
        return []
    others = {m: row[metric.key] for m, row in scores.entries.items() if m != BASELINE and metric.key in row}
    found = {
        words: [m for m, entry in others.items() if entry.against_baseline == verdict]
        for verdict, words in (
            ("better", "significantly better"),
            ("worse", "significantly worse"),
            ("no significant difference", "no significant difference"),
        )
    }
    parts = [f"{words}: {join_names(names)}" for words, names in found.items() if names]
    return [f"{metric.label} compared with {BASELINE}: {'; '.join(parts)}."] if parts else []


def _closest(rows: list[AgreementRow]) -> list[str]:
    ranked = [row for row in rows if row.spearman is not None]
    if not ranked:
        return []
    closest = min(ranked, key=lambda row: row.relative_rmse.mean)
    assert closest.spearman is not None
    return [
        f"Closest to linearized Laplace by relative RMSE of the variance: {closest.method} "
        f"({number(closest.relative_rmse.mean)}; Spearman {number(closest.spearman.mean)}, "
        f"mean ratio {number(closest.mean_ratio.mean)})."
    ]


def _cheapest(costs: list[CostRow], rows: list[AgreementRow]) -> list[str]:
    with_variance = {row.method for row in rows if row.spearman is not None}
    candidates = [row for row in costs if row.method in with_variance]
    if len(candidates) < 2:
        return []
    least = min(candidates, key=lambda row: row.fit_seconds + row.predict_seconds)
    total = in_seconds(least.fit_seconds + least.predict_seconds)
    return [f"Fastest approximate variance: {least.method}, {total} to fit and predict."]
