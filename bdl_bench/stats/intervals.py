"""Intervals of means over seeds, and verdicts on differences, corrected for the number of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

__all__ = [
    "Direction",
    "Interval",
    "Verdict",
    "holm",
    "mean_interval",
    "not_significantly_worse",
    "paired_interval",
    "verdicts",
]

Verdict = Literal["better", "worse", "no significant difference", "unknown"]
Direction = Literal["lower", "higher"]
SIGNIFICANCE_LEVEL = 0.05
"""Family-wise error rate of the verdicts on a set of comparisons."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Args:
        mean: of n numbers.
        low: lower end; None if there is no interval, as for n = 1.
        high: upper end; None if there is no interval.
        n: how many numbers.
        p_value: two-sided, of the hypothesis that the mean is 0; None if there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p_value: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the width of the interval; None if there is no interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean with its Student t interval, mean ± t₀.₉₇₅(n − 1) s/√n.

    Args:
        values: n numbers, such as one per seed.

    Returns:
        The interval, without ends for n = 1 or a value that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1 or not np.isfinite(numbers).all():
        return Interval(mean, None, None, n)
    error = float(numbers.std(ddof=1) / np.sqrt(n))
    half = float(student.ppf(0.975, n - 1)) * error
    p_value = float(2 * student.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p_value)


def paired_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the Student t interval of the mean of values − others, paired by seed.

    Args:
        values: one number per seed.
        others: one number for each of the same seeds.

    Returns:
        The interval of the mean difference.
    """
    return mean_interval([a - b for a, b in zip(values, others, strict=True)])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted by Holm's (1979) step-down method, which controls the family-wise error rate.

        p̃₍ᵢ₎ = max over j <= i of min(1, (m − j + 1) p₍ⱼ₎),  p₍₁₎ <= ... <= p₍ₘ₎

    Args:
        p_values: the m p-values by name.

    Returns:
        The adjusted p-values by name.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def verdicts(differences: Mapping[str, Interval], better: Direction) -> dict[str, Verdict]:
    """Return which methods are significantly better or worse than one other method.

    The p-values are corrected by Holm's method, so that the probability of any false difference among these
    comparisons is at most 5 %.

    Args:
        differences: the interval of method − other for each method.
        better: which direction is better.

    Returns:
        The verdict by method; "unknown" if its difference has no p-value.
    """
    adjusted = holm({name: d.p_value for name, d in differences.items() if d.p_value is not None})
    found: dict[str, Verdict] = {}
    for name, difference in differences.items():
        if name not in adjusted:
            found[name] = "unknown"
        elif adjusted[name] > SIGNIFICANCE_LEVEL:
            found[name] = "no significant difference"
        else:
            found[name] = "better" if (difference.mean < 0) == (better == "lower") else "worse"
    return found


def not_significantly_worse(against_best: Mapping[str, Verdict], best: str) -> set[str]:
    """Return the best method and all that are not significantly worse.

    Args:
        against_best: verdict on each other method against the best one.
        best: the method with the best mean.

    Returns:
        The names; empty if that would be all methods, or if a verdict is unknown.
    """
    if "unknown" in against_best.values() or "worse" not in against_best.values():
        return set()
    return {best, *(name for name, found in against_best.items() if found != "worse")}
