"""Intervals of means over seeds, and the verdict on the interval of a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

__all__ = ["Direction", "Interval", "Verdict", "mean_interval", "not_significantly_worse", "paired_interval", "verdict"]

Verdict = Literal["better", "worse", "no significant difference", "unknown"]
Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Args:
        mean: of n numbers.
        low: lower end; None if there is no interval, as for n = 1.
        high: upper end; None if there is no interval.
        n: how many numbers.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

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
    half = float(student.ppf(0.975, n - 1) * numbers.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the Student t interval of the mean of values − others, paired by seed.

    Args:
        values: one number per seed.
        others: one number for each of the same seeds.

    Returns:
        The interval of the mean difference.
    """
    return mean_interval([a - b for a, b in zip(values, others, strict=True)])


def verdict(difference: Interval, better: Direction) -> Verdict:
    """Return whether a method is significantly better or worse than another one.

    Args:
        difference: the interval of method − other.
        better: which direction is better.

    Returns:
        "no significant difference" if the interval contains 0, "unknown" if there is no interval.
    """
    if difference.low is None or difference.high is None:
        return "unknown"
    if difference.low <= 0 <= difference.high:
        return "no significant difference"
    return "better" if (difference.mean < 0) == (better == "lower") else "worse"


def not_significantly_worse(means: Mapping[str, float], against_best: Mapping[str, Verdict], best: str) -> set[str]:
    """Return the best method and all that are not significantly worse.

    Args:
        means: mean of each method.
        against_best: verdict on each other method against the best one.
        best: the method of the best mean.

    Returns:
        The names; empty if that would be all methods, or if a verdict is unknown.
    """
    if any(against_best[name] == "unknown" for name in means if name != best):
        return set()
    group = {name for name in means if name == best or against_best[name] != "worse"}
    return set() if len(group) == len(means) else group
