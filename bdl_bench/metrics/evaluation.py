"""Metrics of the other sets of rows: out-of-distribution detection, and the metrics of test rows under shift."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import ood
from bdl_bench.metrics.groups import parts
from bdl_bench.metrics.metric import Arrays, Metric, Sample
from bdl_bench.metrics.per_example import entropy_order, predictive_entropy, variance_of_row
from bdl_bench.metrics.table import METRICS, variance_metrics

__all__ = ["evaluate", "metrics_of", "ood_metrics", "ood_scores", "shift_metrics"]

Floats = NDArray[np.float64]

_SHIFTED = {
    "regression": ("reg/RMSE", "reg/NLL"),
    "classification": ("cls/Acc", "cls/NLL", "cal/ECE"),
    "binary": ("cls/Acc", "cls/NLL", "cal/ECE"),
}
_SEVERITY = re.compile(r"(.+)-(\d+)")


def evaluate(kind: str, arrays: Arrays) -> dict[str, float]:
    """Every metric that these arrays of that kind ("regression", "classification", "binary") allow, by key."""
    return {metric.key: metric.value(arrays) for metric in metrics_of(kind, arrays)}


def metrics_of(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """The metrics that `evaluate` has for these arrays: of the test rows, then by set."""
    by_variance = variance_metrics(kind, arrays)
    return *METRICS[kind], *by_variance, *ood_metrics(kind, arrays), *shift_metrics(kind, arrays)


def ood_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """AUROC, AUPR and FPR95 of each set and score; none for a score that is the same at all rows: it says nothing."""
    return tuple(
        metric
        for name in parts(arrays).ood
        for score in ("variance", "entropy")
        if _differ(np.concatenate(_detection_scores(kind, arrays, name, score)))
        for metric in _detection(kind, name, score)
    )


def ood_scores(kind: str, arrays: Arrays, name: str, score: str) -> tuple[Floats, Floats]:
    """The scores, "variance" or "entropy", of the test rows and of the rows of an out-of-distribution set."""
    split = parts(arrays)
    if score == "variance":
        return variance_of_row(split.test), variance_of_row(split.ood[name])
    return predictive_entropy(kind, split.test), predictive_entropy(kind, split.ood[name])


def _detection_scores(kind: str, arrays: Arrays, name: str, score: str) -> tuple[Floats, Floats]:
    """Scores that order the rows as `ood_scores` do, without ties of entropies that are 0 in float64."""
    if score == "variance":
        return ood_scores(kind, arrays, name, score)
    split = parts(arrays)
    return entropy_order(kind, split.test), entropy_order(kind, split.ood[name])


def _differ(scores: Floats) -> bool:
    return bool((scores != scores[0]).any())


def shift_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """The metrics of each shifted set, and their mean over the severities of a family, <family>-mean."""
    sets = list(parts(arrays).shift)
    families: dict[str, list[str]] = {}
    for name in sets:
        if match := _SEVERITY.fullmatch(name):
            families.setdefault(match[1], []).append(name)
    bases = [metric for metric in METRICS[kind] if metric.key in _SHIFTED[kind]]
    single = (_on_set(base, name) for name in sets for base in bases)
    means = (_mean_over(base, family, names) for family, names in families.items() for base in bases)
    return *single, *means


def _detection(kind: str, name: str, score: str) -> tuple[Metric, ...]:
    rows = partial(_detection_rows, kind, name, score)
    told = f"of {name} told from the test rows by {score}, OOD positive"

    def metric(key: str, reading: str, function: Callable[..., Floats], *, lower: bool = False) -> Metric:
        label, better = f"{key} {name} ({score})", "lower" if lower else "higher"
        return Metric(f"ood/{key}/{name}/{score}", label, f"{reading} {told}", better,  # type: ignore[arg-type]
                      rows=rows, whole=partial(_two_groups, function))  # fmt: skip

    return (
        metric("AUROC", "area under the ROC curve", ood.auroc),
        metric("AUPR", "average precision", ood.average_precision),
        metric("FPR95", "false-positive rate at 95 % recall", ood.fpr_at_recall, lower=True),
    )


def _detection_rows(kind: str, name: str, score: str, arrays: Arrays) -> Sample:
    inside, outside = _detection_scores(kind, arrays, name, score)
    return (inside,), (outside,)


def _two_groups(function: Callable[..., Floats], sample: Sample) -> Floats:
    (inside,), (outside,) = sample
    return function(inside, outside)


def _on_set(base: Metric, name: str) -> Metric:
    short = base.key.rpartition("/")[2]
    return replace(
        base,
        key=f"shift/{short}/{name}",
        label=f"{base.label} {name}",
        reading=f"{base.reading}; rows shifted by {name}",
        scores=None if base.scores is None else partial(_scores_on_set, base.scores, name),
        rows=None if base.rows is None else partial(_rows_on_set, base.rows, name),
    )


def _scores_on_set(scores: Callable[[Arrays], Floats], name: str, arrays: Arrays) -> Floats:
    return scores(parts(arrays).shift[name])


def _rows_on_set(rows: Callable[[Arrays], Sample], name: str, arrays: Arrays) -> Sample:
    return rows(parts(arrays).shift[name])


def _mean_over(base: Metric, family: str, names: list[str]) -> Metric:
    short = base.key.rpartition("/")[2]
    return Metric(
        f"shift/{short}/{family}-mean",
        f"{base.label} {family}",
        f"{base.reading}; mean over {len(names)} severities of {family}",
        base.better,
        rows=partial(_rows_of_severities, base, names),
        whole=partial(_mean_of_severities, base),
    )


def _rows_of_severities(base: Metric, names: list[str], arrays: Arrays) -> Sample:
    shift = parts(arrays).shift
    return tuple(group for name in names for group in base.sample(shift[name]))


def _mean_of_severities(base: Metric, sample: Sample) -> Floats:
    mean: Floats = np.mean([base.statistic((group,)) for group in sample], axis=0)
    return mean
