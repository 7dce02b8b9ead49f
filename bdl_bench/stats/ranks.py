"""Comparisons over tasks by ranks (Demšar 2006, "Statistical comparisons of classifiers over multiple data sets")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as fisher
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from bdl_bench.stats.intervals import Direction
from bdl_bench.stats.ties import merge_ties
from estimators.errors import DataError

__all__ = ["FEWEST_TASKS", "Ranking", "critical_difference", "rank_methods"]

Floats = NDArray[np.float64]

FEWEST_TASKS = 5
"""Tasks below this number are ranked, but their ranks are not tested: with four tasks and ten methods, the critical
difference is 6.8 ranks, of a largest possible difference of nine."""


@dataclass(frozen=True)
class Ranking:
    """Methods by average rank over tasks; rank 1 is the best.

    Args:
        average: rank of each method, best first.
        n_tasks: number of tasks.
        p_value: of Friedman's test that all methods are equal, in the form of Iman and Davenport.
        critical_difference: Nemenyi's; smaller differences of ranks are not significant.
        groups: the largest sets of at least two methods within one critical difference (the bars of Demšar's diagram).
    """

    average: dict[str, float]
    n_tasks: int
    p_value: float
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]


def rank_methods(values: Mapping[str, Mapping[str, float]], better: Direction, *, level: float = 0.95) -> Ranking:
    """Return the average ranks of K >= 3 methods over N >= 2 tasks, with Friedman's test.

        F = (N − 1) χ² / (N (K − 1) − χ²) on K − 1 and (K − 1)(N − 1) degrees of freedom; χ² is Friedman's, with ties

    Args:
        values: `values[task][method]`, one number each, such as a mean over seeds.
        better: which direction is better.
        level: one minus the significance level of the critical difference.

    Numbers that differ by round-off are ties.

    Returns:
        The ranking of Demšar (2006), section 3.2.2.

    Raises:
        DataError: for fewer tasks or methods, if a task lacks a method, or for a NaN.
    """
    names, table = _complete(values)
    ranks = rankdata(table if better == "lower" else -table, axis=1)
    order = np.argsort(ranks.mean(0), kind="stable")
    average = {names[j]: float(ranks[:, j].mean()) for j in order}
    difference = critical_difference(len(names), len(table), level=level)
    return Ranking(average, len(table), _friedman(table), difference, _groups(average, difference))


def critical_difference(n_methods: int, n_tasks: int, *, level: float = 0.95) -> float:
    """Return Nemenyi's critical difference of average ranks, q √(K (K + 1) / 6N), √2 q of the studentized range.

    Args:
        n_methods: K.
        n_tasks: N.
        level: one minus the significance level.

    Returns:
        The difference of average ranks beyond which two methods differ significantly.
    """
    q = studentized_range.ppf(level, n_methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(n_methods * (n_methods + 1) / (6 * n_tasks)))


def _complete(values: Mapping[str, Mapping[str, float]]) -> tuple[list[str], Floats]:
    names = sorted({name for row in values.values() for name in row})
    missing = [f"{task} lacks {name}" for task, row in values.items() for name in names if name not in row]
    if missing or len(values) < 2 or len(names) < 3:
        raise DataError(
            "at least two tasks, each with the same three methods or more",
            received="; ".join(missing) or f"{len(values)} tasks and {len(names)} methods",
            remedy="leave out methods that some tasks lack; compare two methods by paired_interval.",
        )
    table = np.array([[row[name] for name in names] for row in values.values()], dtype=np.float64)
    if np.isnan(table).any():
        raise DataError("a number at each task and method", received="NaN", remedy="leave that task or method out.")
    return names, np.stack([merge_ties(row) for row in table])


def _friedman(table: Floats) -> float:
    tasks, methods = table.shape
    if (np.ptp(table, axis=1) == 0).all():
        return 1.0
    chi = float(friedmanchisquare(*table.T).statistic)
    rest = tasks * (methods - 1) - chi
    if rest <= 1e-9 * chi:
        return 0.0
    return float(fisher.sf((tasks - 1) * chi / rest, methods - 1, (methods - 1) * (tasks - 1)))


def _groups(average: Mapping[str, float], difference: float) -> tuple[tuple[str, ...], ...]:
    """Return the sets of neighbours in rank within one difference, without subsets of another set."""
    names = list(average)
    runs: list[tuple[str, ...]] = []
    reached = 0
    for start, first in enumerate(names):
        end = max(i for i, name in enumerate(names) if average[name] - average[first] <= difference) + 1
        if end > reached and end - start > 1:
            runs.append(tuple(names[start:end]))
        reached = max(reached, end)
    return tuple(runs)
