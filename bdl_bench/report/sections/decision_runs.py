"""Metrics and curves of the runs of a task with a decision, at the distinct seeds of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bdl_bench.report.sections.context import Context

__all__ = ["Curves", "Floats", "decision_curves", "decision_values"]

Floats = NDArray[np.float64]
Curves = Mapping[str, Floats]
"""Values (S, R + 1) of S seeds by name."""


def decision_values(context: Context, method: str, key: str) -> list[float]:
    """Return a metric of an untuned method at its distinct seeds.

    Args:
        context: results of one task.
        method: name of the method.
        key: of the metric, such as "al/area".

    Returns:
        One value per seed.
    """
    results = context.results
    seeds = context.design.distinct(results.finished[method], [method])
    return [results.metric_values(method, seed)[key] for seed in seeds]


def decision_curves(context: Context, method: str, names: Sequence[str]) -> dict[str, Floats]:
    """Return curves of an untuned method at its distinct seeds.

    Args:
        context: results of one task.
        method: name of the method.
        names: of the curves in the arrays, such as "regret".

    Returns:
        Values (S, R + 1) of S seeds, at the start and after each of R rounds, by name.
    """
    results = context.results
    seeds = context.design.distinct(results.finished[method], [method])
    found = [results.predictions(method, seed).subset("decision") for seed in seeds]
    return {name: np.stack([arrays[name] for arrays in found]) for name in names}
