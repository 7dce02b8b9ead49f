"""The main results of a task, as sentences generated from its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from statistics import median

from bdl_bench.methods import BASELINE
from bdl_bench.records.record import Training
from bdl_bench.report.formatting import join_names, mean_of, number
from bdl_bench.report.reference_agreement import AgreementRow, CostRow
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.stats import FEWEST_SEEDS, Interval, detectable_difference, is_tie
from estimators.runtime.units import in_seconds

__all__ = ["comparison_with_best", "findings", "overtuned", "trained_further"]

_MORE_SEEDS = 10
"""Seeds for which the detectable difference is stated beside that of the present ones."""


def findings(scores: ScoreTable, design: SeedDesign, agreements: list[AgreementRow], costs: list[CostRow]) -> list[str]:
    """Return sentences on the first metric, the baseline, agreement with linearized Laplace, and the least time."""
    return [
        *_first_metric(scores, design),
        *_against_baseline(scores),
        *_detectable(scores, design),
        *_closest(agreements),
        *_cheapest(costs, agreements),
    ]


def trained_further(trainings: Mapping[int, Training | None]) -> list[str]:
    """Return a notice if the recipe trained a network further that came with trained weights.

    Args:
        trainings: of each seed.

    Returns:
        A sentence that names the seeds, the epochs and the remedy; nothing if no network was trained further.
    """
    found = {seed: training for seed, training in trainings.items() if training is not None and training.further}
    if not found:
        return []
    seeds = f"seed{'' if len(found) == 1 else 's'} {', '.join(map(str, sorted(found)))}"
    return [
        f"The network of {seeds} came with trained weights and was trained further for "
        f"{next(iter(found.values())).epochs} epochs, because the problem has a recipe. Problem(..., trained=True) "
        "uses the given weights."
    ]


def overtuned(untuned: ScoreTable, tuned: ScoreTable | None) -> list[str]:
    """Return a warning if the mean of the first metric of the test rows is worse after tuning for most methods."""
    metric = untuned.metrics[0]
    if tuned is None or metric.better is None:
        return []
    sign = 1 if metric.better == "lower" else -1
    smallest = tuned.relevant.get(metric.key, 0.0)
    both = [m for m in tuned.entries if metric.key in tuned.entries[m] and metric.key in untuned.entries.get(m, {})]
    means = {m: [table.entries[m][metric.key].interval.mean for table in (untuned, tuned)] for m in both}
    worse = [
        m for m, (before, after) in means.items() if sign * (after - before) > smallest and not is_tie(before, after)
    ]
    if 2 * len(worse) <= len(both):
        return []
    return [
        f"The {mean_of(metric.label)} of the test rows is worse after tuning for {len(worse)} of {len(both)} methods "
        "(not tested). With few validation rows, tuning overfits; compare with the untuned table."
    ]


def _first_metric(scores: ScoreTable, design: SeedDesign) -> list[str]:
    metric = scores.metrics[0]
    if metric.key not in scores.best or len(scores.entries) < 2:
        return []
    best = scores.best[metric.key]
    value = number(scores.entries[best][metric.key].interval.mean)
    names = join_names([best, *scores.tied_with_best(metric.key)])
    return [f"Best {mean_of(metric.label)}: {names} ({value}){comparison_with_best(scores, design)}."]


def comparison_with_best(scores: ScoreTable, design: SeedDesign) -> str:
    """Return the end of a sentence on the best method: how the others compare with it by the first metric.

    Every statement on significance is a test of that method against the best one, corrected for all pairs of methods.
    """
    key = scores.metrics[0].key
    best, near = scores.best[key], scores.near_best(key)
    tied = [*scores.tied_with_best(key), *near]
    if len(scores.entries) > 1 and design.n_distinct < FEWEST_SEEDS:
        return "; not tested, since the seeds are too few"
    found = scores.tests[key].with_method(best)
    better = [m for m, verdict in found.items() if verdict == "better"]  # only a method that misses seeds can be
    near = [m for m in near if m not in better]
    worse = [m for m, verdict in found.items() if verdict == "worse" and m not in tied]
    not_worse = ("no significant difference", "no relevant difference")
    equal = [m for m, verdict in found.items() if verdict in not_worse and m not in tied]
    others = [m for m, row in scores.entries.items() if key in row and m not in (best, *tied)]
    untested = [m for m in others if found.get(m, "unknown") == "unknown"]
    if not worse and not equal and not untested and not near and not better:
        return ""
    parts = [f"no relevant difference: {join_names(near)}"] if near else []
    if worse and not equal and not untested:
        rest = "all other methods that finished every seed" if better else "all others"
        parts.append(f"{rest} are significantly worse" if len(worse) > 1 else f"significantly worse: {worse[0]}")
    elif not worse:
        parts.append("none of the others is significantly worse" if equal else "")
    else:
        parts += [f"significantly worse: {join_names(worse)}"]
        parts += [f"not significantly worse: {join_names(equal)}"] if equal else []
    parts += [f"better over the seeds that {_it_has(better)}: {join_names(better)}"] if better else []
    parts += [f"not tested: {join_names(untested)}"] if untested else []
    return "".join(f"; {part}" for part in parts if part)


def _it_has(methods: list[str]) -> str:
    return "it has" if len(methods) == 1 else "they have"


def _detectable(scores: ScoreTable, design: SeedDesign) -> list[str]:
    """Return the difference that these seeds and rows can show, and what ten seeds could."""
    metric = scores.metrics[0]
    tests = scores.tests.get(metric.key)
    if tests is None:
        return []
    against = tests.baseline_differences or tests.differences
    found = [d for d in against.values() if d.p_value is not None and d.p_value < 1]  # 1: equal up to round-off
    needed = [v for d in found if (v := detectable_difference(d, n_comparisons=len(found))) is not None]
    if not needed:
        return []
    other = f"{metric.label} from {BASELINE}" if tests.baseline_differences else metric.label
    rows = f"{min(design.n_rows):,} test row{'' if min(design.n_rows) == 1 else 's'}"
    spread = f" (median over methods; {number(min(needed))} to {number(max(needed))})" if len(needed) > 1 else ""
    corrected = f", after the correction for {len(found)} tests" if len(found) > 1 else ""
    return [
        f"With {design.n_distinct} seeds and {rows}, a difference in {other} of {number(median(needed))}{spread} is "
        f"detected with probability 0.8{corrected}{_with_more_seeds(found, design)}."
    ]


def _with_more_seeds(found: list[Interval], design: SeedDesign) -> str:
    """Return what more seeds would detect, if each has test rows of its own, so that the variance falls as 1/seeds."""
    if design.same_rows or design.n_distinct >= _MORE_SEEDS:
        return ""
    more = [
        replace(
            d,
            n=_MORE_SEEDS,
            standard_error=d.standard_error * sqrt(d.n / _MORE_SEEDS),
            components=[(1.0, _MORE_SEEDS - 1.0)],
        )
        for d in found
        if d.standard_error
    ]
    needed = [v for d in more if (v := detectable_difference(d, n_comparisons=len(found))) is not None]
    return f"; with {_MORE_SEEDS} seeds, one of about {number(median(needed))}" if needed else ""


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
            ("no relevant difference", "significant, but not relevant"),
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
