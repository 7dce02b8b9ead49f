"""What a task showed, in sentences made from its tables."""

from __future__ import annotations

from collections.abc import Iterable

from bdl_bench.methods import BASELINE
from bdl_bench.records.record import Training
from bdl_bench.report.formatting import duration, listed, number
from bdl_bench.report.reference_agreement import AgreementRow, CostRow
from bdl_bench.report.scores import ScoreTable

__all__ = ["findings", "overtuned", "trained_further"]


def findings(scores: ScoreTable, agreements: list[AgreementRow], costs: list[CostRow]) -> list[str]:
    """The first metric, the comparison with the baseline, the closest variance and the cheapest method with one."""
    return [
        *_first_metric(scores),
        *_against_baseline(scores),
        *_closest(agreements),
        *_cheapest(costs, agreements),
    ]


def trained_further(trainings: Iterable[Training | None]) -> list[str]:
    """If the recipe trained a network that had been trained before: for how long, and how to have it used as it is."""
    found = [training for training in trainings if training is not None and training.further]
    if not found:
        return []
    return [
        f"The network came with trained weights and was trained further for {found[0].epochs} epochs, since the "
        "problem has a recipe. Problem(..., trained=True) uses it as it is."
    ]


def overtuned(fitted: ScoreTable, tuned: ScoreTable | None) -> list[str]:
    """Where tuning made the first metric of the test rows worse for most methods: too few validation rows."""
    metric = fitted.metrics[0]
    if tuned is None or metric.better is None:
        return []
    sign = 1 if metric.better == "lower" else -1
    both = [m for m in tuned.cells if metric.key in tuned.cells[m] and metric.key in fitted.cells.get(m, {})]
    worse = [
        m
        for m in both
        if sign * (tuned.cells[m][metric.key].interval.mean - fitted.cells[m][metric.key].interval.mean) > 0
    ]
    if 2 * len(worse) <= len(both):
        return []
    return [
        f"Tuning made {metric.label} of the test rows worse for {len(worse)} of {len(both)} methods: the validation "
        "rows are too few for what it chooses. Look at the table as fitted, too."
    ]


def _first_metric(scores: ScoreTable) -> list[str]:
    metric = scores.metrics[0]
    if metric.key not in scores.best or len(scores.cells) < 2:
        return []
    best = scores.best[metric.key]
    rows = {m: row[metric.key] for m, row in scores.cells.items() if metric.key in row}
    group = [m for m, cell in rows.items() if cell.in_best_group and m != best]
    value = number(rows[best].interval.mean)
    if group:
        return [f"Best {metric.label}: {best} ({value}); not distinguishable from it: {listed(group)}."]
    alone = rows[best].in_best_group
    rest = "ahead of every other method" if alone else "but no two methods can be told apart by it"
    return [f"Best {metric.label}: {best} ({value}), {rest}."]


def _against_baseline(scores: ScoreTable) -> list[str]:
    metric = scores.metrics[0]
    if BASELINE not in scores.cells:
        return []
    verdicts = {m: row[metric.key].against for m, row in scores.cells.items() if m != BASELINE and metric.key in row}
    better = [m for m, v in verdicts.items() if v == "better"]
    worse = [m for m, v in verdicts.items() if v == "worse"]
    same = [m for m, v in verdicts.items() if v == "no significant difference"]
    parts = [f"{word}: {listed(names)}" for word, names in
             (("better", better), ("worse", worse), ("no significant difference", same)) if names]  # fmt: skip
    return [f"{metric.label} against {BASELINE}: {'; '.join(parts)}."] if parts else []


def _closest(rows: list[AgreementRow]) -> list[str]:
    ranked = [row for row in rows if row.spearman is not None]
    if not ranked:
        return []
    closest = min(ranked, key=lambda row: row.relative_rmse.mean)
    assert closest.spearman is not None
    return [
        f"Closest to the exact variance, by relative RMSE: {closest.method} ({number(closest.relative_rmse.mean)}; "
        f"Spearman {number(closest.spearman.mean)}, mean ratio {number(closest.mean_ratio.mean)})."
    ]


def _cheapest(costs: list[CostRow], rows: list[AgreementRow]) -> list[str]:
    with_variance = {row.method for row in rows if row.spearman is not None}
    candidates = [row for row in costs if row.method in with_variance]
    if len(candidates) < 2:
        return []
    least = min(candidates, key=lambda row: row.fit_seconds + row.predict_seconds)
    total = duration(least.fit_seconds + least.predict_seconds)
    return [f"Least time for an approximate variance: {least.method}, {total} to fit and predict."]
