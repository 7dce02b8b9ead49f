"""Means over tasks: one effect of a method over several tasks whose metric has the same unit, such as NLL in nats."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from bdl_bench.stats.intervals import Components, Interval, interval_from

__all__ = ["mean_over_tasks"]


def mean_over_tasks(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of independent estimates, one per task, with its 95 % interval.

        mean = (1/K) Σ_k m_k          Var(mean) = (1/K²) Σ_k se_k²

    The tasks are fixed: the interval says how the mean over these K tasks would vary with other seeds, not with other
    tasks. Each part of the variance keeps its degrees of freedom (`critical_value`).

    Args:
        intervals: of the K >= 1 tasks, in one unit.

    Returns:
        The interval with the smallest number of seeds as n; without ends if a task has none. One task: its interval.

    Example:
        >>> from bdl_bench.stats import mean_interval
        >>> found = mean_over_tasks([mean_interval([1.0, 2.0, 3.0]), mean_interval([3.0, 4.0, 5.0])])
        >>> f"{found.mean:.1f} with a standard error of {found.standard_error:.3f}"
        '3.0 with a standard error of 0.408'
    """
    if len(intervals) == 1:
        return intervals[0]
    mean = sum(interval.mean for interval in intervals) / len(intervals)
    n = min(interval.n for interval in intervals)
    errors = [interval.standard_error for interval in intervals]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return Interval(mean, None, None, n)
    total = sqrt(sum(error**2 for error in known))
    if total == 0:
        return interval_from(mean, 0.0, intervals[0].components, n)
    components: Components = [
        (share * (error / total) ** 2, freedom)
        for error, interval in zip(known, intervals, strict=True)
        for share, freedom in interval.components
        if error > 0
    ]
    return interval_from(mean, total / len(intervals), components, n)
