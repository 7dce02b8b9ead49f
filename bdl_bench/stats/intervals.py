"""Intervals of means over seeds, and what the interval of a difference says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

__all__ = ["Direction", "Interval", "Verdict", "best_group", "mean_interval", "paired_interval", "verdict"]

Verdict = Literal["better", "worse", "not distinguishable", "unknown"]
Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Interval:
    """A mean of n numbers with its 95 % interval; no interval for n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean ± t₀.₉₇₅(n − 1) s/√n."""
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1 or not np.isfinite(numbers).all():
        return Interval(mean, None, None, n)
    half = float(student.ppf(0.975, n - 1) * numbers.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The t-interval of the differences values − others, paired by seed."""
    return mean_interval([a - b for a, b in zip(values, others, strict=True)])


def verdict(difference: Interval, better: Direction) -> Verdict:
    """What the interval of a difference (method − other) says of the method."""
    if difference.low is None or difference.high is None:
        return "unknown"
    if difference.low <= 0 <= difference.high:
        return "not distinguishable"
    return "better" if (difference.mean < 0) == (better == "lower") else "worse"


def best_group(means: Mapping[str, float], against_best: Mapping[str, Verdict], best: str) -> set[str]:
    """The best method with all that are not distinguishable from it; empty where that is everyone or cannot be told."""
    if any(against_best[name] == "unknown" for name in means if name != best):
        return set()
    group = {name for name in means if name == best or against_best[name] != "worse"}
    return set() if len(group) == len(means) else group
