"""Disagreement between methods: how much their predictions differ at the same test rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bdl_bench.metrics.disagreement import mean_difference, top_label_disagreement, total_variation
from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context

__all__ = ["Disagreements", "disagreements"]


@dataclass(frozen=True)
class Disagreements:
    """Means over shared seeds: `values[method][other]`, None without a shared seed, symmetric; 0 on the diagonal.

    For classes and binary outputs `values` are total variations, and `labels` the shares of rows with other top labels.
    """

    template: ClassVar[str] = "disagreement.html"
    kind: str
    methods: list[str]
    values: dict[str, dict[str, float | None]]
    labels: dict[str, dict[str, float | None]]
    tuned: bool


def disagreements(context: Context) -> Disagreements | None:
    """Return the distances of all pairs, tuned if every method was tuned; None for a single method."""
    results = context.results
    if len(results.methods) < 2:
        return None
    tuned = results.all_tuned
    pairs = {(a, b): _distances(results, a, b, tuned=tuned) for a in results.methods for b in results.methods if a <= b}
    values, labels = (
        {a: {b: pairs[min(a, b), max(a, b)][index] for b in results.methods} for a in results.methods}
        for index in (0, 1)
    )
    return Disagreements(results.kind, results.methods, values, labels, tuned)


def _distances(results: TaskResults, method: str, other: str, *, tuned: bool) -> tuple[float | None, float | None]:
    seeds = results.shared_seeds(method, other)
    if not seeds:
        return None, None
    found = [_of_seed(results, method, other, seed, tuned=tuned) for seed in seeds]
    first, second = (float(np.mean(column)) for column in zip(*found, strict=True))
    return first, second


def _of_seed(results: TaskResults, method: str, other: str, seed: int, *, tuned: bool) -> tuple[float, float]:
    one, two = (results.predictions(name, seed, tuned=tuned) for name in (method, other))
    if results.kind == "regression":
        moments = (found[name] for found in (one, two) for name in ("mean", "total_variance"))
        return mean_difference(*moments), 0.0
    probs, others = one["probs"], two["probs"]
    if results.kind == "binary":
        probs, others = (np.stack([1 - p, p], axis=-1).reshape(-1, 2) for p in (probs, others))
    return float(total_variation(probs, others).mean()), top_label_disagreement(probs, others)
