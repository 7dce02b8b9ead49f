"""Intervals over seeds, and paired comparisons of two methods on the same test examples.

A difference is called distinguishable when its 95 % interval leaves out zero. Where a metric is a mean over examples,
that is a two-level bootstrap of the paired differences: seeds drawn with replacement, then examples within each. Other
metrics have one number a seed, and a paired t-interval. Nothing is corrected for the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

__all__ = ["Interval", "Verdict", "best_group", "bootstrap_difference", "mean_interval", "paired_interval", "verdict"]

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "not distinguishable", "unknown"]
Direction = Literal["lower", "higher"]
_BLOCKS = 2000


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


def bootstrap_difference(
    scores: Sequence[Floats], others: Sequence[Floats], *, n_resamples: int = 1000, seed: int = 0
) -> Interval:
    """95 % percentile interval of the mean of scores − others, one array of per-example scores a seed.

    Arrays of more than 2,000 examples are averaged in that many blocks first, which leaves the variance of the mean.
    """
    differences = [_blocks(a - b) for a, b in zip(scores, others, strict=True)]
    mean = float(np.mean([d.mean() for d in differences]))
    if not np.isfinite(mean):
        return Interval(mean, None, None, len(differences))
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(differences), size=(n_resamples, len(differences)))
    drawn = np.empty(picks.shape)
    for s, difference in enumerate(differences):
        places = picks == s
        rows = rng.integers(len(difference), size=(int(places.sum()), len(difference)))
        drawn[places] = difference[rows].mean(-1)
    low, high = np.quantile(drawn.mean(-1), (0.025, 0.975))
    return Interval(mean, float(low), float(high), len(differences))


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


def _blocks(values: Floats) -> Floats:
    """At most 2,000 block means, of blocks of one size but for one row."""
    if len(values) <= _BLOCKS:
        return values
    return np.array([block.mean() for block in np.array_split(values, _BLOCKS)])
