"""Metrics of a record: of the test rows, of out-of-distribution detection, and of the test rows under shift."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import ood
from bdl_bench.metrics.decisions import decision_metrics, intervention_metrics
from bdl_bench.metrics.groups import parts
from bdl_bench.metrics.metric import RELEVANT_RATE, Arrays, Metric
from bdl_bench.metrics.per_example import entropy_order, information_of_row, predictive_entropy, variance_of_row
from bdl_bench.metrics.table import METRICS, conformal_metrics, sample_metrics, variance_metrics

__all__ = ["OOD_SCORES", "evaluate", "metrics_of", "ood_metrics", "ood_scores", "shift_metrics"]

Floats = NDArray[np.float64]

_SHIFTED = {
    "regression": ("reg/RMSE", "reg/NLL"),
    "classification": ("cls/Acc", "cls/NLL", "cal/ECE"),
    "binary": ("cls/Acc", "cls/NLL", "cal/ECE"),
}
OOD_SCORES = ("variance", "entropy", "mutual_information", "score")
"""Scores of a row by which out-of-distribution rows are detected; "score" is the method's own, `estimator.score(x)`."""
_OF_EVERY_METHOD = ("variance", "entropy")
_SEVERITY = re.compile(r"(.+)-(\d+)")


def evaluate(kind: str, arrays: Arrays) -> dict[str, float]:
    """Return every metric that these arrays allow, by key.

    Args:
        kind: "regression", "classification" or "binary".
        arrays: predictions and targets by name, in the layout of `bdl_bench.metrics.groups`.

    Returns:
        The value of each metric of `metrics_of`.
    """
    return {metric.key: metric.value(arrays) for metric in metrics_of(kind, arrays)}


def metrics_of(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """Return the metrics that `evaluate` computes for these arrays: of decisions, of test rows, of each named set.

    Args:
        kind: "regression", "classification" or "binary".
        arrays: predictions and targets by name, in the layout of `bdl_bench.metrics.groups`.

    Returns:
        The metrics, in the order of tables.
    """
    conditional = *variance_metrics(kind, arrays), *sample_metrics(kind, arrays), *conformal_metrics(kind, arrays)
    conditional = *conditional, *intervention_metrics(arrays)
    return (
        *decision_metrics(kind, arrays),
        *METRICS[kind],
        *conditional,
        *ood_metrics(kind, arrays),
        *shift_metrics(kind, arrays),
    )


def ood_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """Return AUROC, AUPR and FPR95 of each set and score; nothing for a constant score, which detects nothing."""
    return tuple(
        metric
        for name in parts(arrays).ood
        for score in OOD_SCORES
        if _has_score(arrays, name, score)
        and len(np.unique(np.concatenate(_detection_scores(kind, arrays, name, score)))) > 1
        for metric in _detection(kind, name, score)
    )


def ood_scores(kind: str, arrays: Arrays, name: str, score: str) -> tuple[Floats, Floats]:
    """Return the scores of one of `OOD_SCORES`: of the test rows, (M,), and of an out-of-distribution set, (K,)."""
    split = parts(arrays)
    if score == "mutual_information":
        return information_of_row(split.test), information_of_row(split.ood[name])
    if score == "score":
        return split.test["score"], split.ood[name]["score"]
    if score == "variance":
        return variance_of_row(split.test), variance_of_row(split.ood[name])
    return predictive_entropy(kind, split.test), predictive_entropy(kind, split.ood[name])


def shift_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """Return the metrics of each shifted set, and their mean over the severities of a family, <family>-mean."""
    sets = list(parts(arrays).shift)
    families: dict[str, list[str]] = {}
    for name in sets:
        if match := _SEVERITY.fullmatch(name):
            families.setdefault(match[1], []).append(name)
    bases = [metric for metric in METRICS[kind] if metric.key in _SHIFTED[kind]]
    single = (_on_set(base, name) for name in sets for base in bases)
    means = (_mean_over(base, family, names) for family, names in families.items() for base in bases)
    return *single, *means


def _detection_scores(kind: str, arrays: Arrays, name: str, score: str) -> tuple[Floats, Floats]:
    """Return scores in the order of `ood_scores`, without ties of entropies that are 0 in float64."""
    if score != "entropy":
        return ood_scores(kind, arrays, name, score)
    split = parts(arrays)
    return entropy_order(kind, split.test), entropy_order(kind, split.ood[name])


def _has_score(arrays: Arrays, name: str, score: str) -> bool:
    """Return whether both sets of rows have a score: not every method has mutual information, or a score of its own."""
    split = parts(arrays)
    return score in _OF_EVERY_METHOD or all(score in found for found in (split.test, split.ood[name]))


def _detection(kind: str, name: str, score: str) -> tuple[Metric, ...]:
    def metric(key: str, reading: str, function: Callable[..., float], better: Literal["lower", "higher"]) -> Metric:
        def compute(arrays: Arrays) -> float:
            return function(*_detection_scores(kind, arrays, name, score))

        words = "own score" if score == "score" else score.replace("_", " ")
        reading = f"{reading} of separating {name} from the test rows by {words}, OOD positive"
        label = f"{key} {name} ({words})"
        return Metric(f"ood/{key}/{name}/{score}", label, reading, better, compute=compute, relevant=RELEVANT_RATE)

    return (
        metric("AUROC", "area under the ROC curve", ood.auroc, "higher"),
        metric("AUPR", "average precision", ood.average_precision, "higher"),
        metric("FPR95", "false-positive rate at 95 % recall", ood.fpr_at_recall, "lower"),
    )


def _on_set(base: Metric, name: str) -> Metric:
    def of_set(function: Callable[[Arrays], Any] | None) -> Callable[[Arrays], Any] | None:
        return None if function is None else lambda arrays: function(parts(arrays).shift[name])

    return replace(
        base,
        key=f"shift/{_short(base)}/{name}",
        label=f"{base.label} {name}",
        reading=f"{base.reading}; rows shifted by {name}",
        scores=of_set(base.scores),
        compute=of_set(base.compute),
    )


def _mean_over(base: Metric, family: str, names: list[str]) -> Metric:
    def mean(arrays: Arrays) -> float:
        return float(np.mean([base.value(parts(arrays).shift[name]) for name in names]))

    return Metric(
        f"shift/{_short(base)}/{family}-mean",
        f"{base.label} {family}",
        f"{base.reading}; mean over {len(names)} severities of {family}",
        base.better,
        compute=mean,
        relevant=base.relevant,
    )


def _short(metric: Metric) -> str:
    return metric.key.rpartition("/")[2]
