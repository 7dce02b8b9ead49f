"""A mean with its interval, and verdicts on differences, corrected for the number of comparisons."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import nct

__all__ = [
    "FEWEST_SEEDS",
    "SIGNIFICANCE_LEVEL",
    "Direction",
    "Interval",
    "Verdict",
    "critical_value",
    "detectable_difference",
    "holm",
    "interval_from",
    "mean_interval",
    "not_significantly_worse",
    "verdicts",
]

Verdict = Literal["better", "worse", "no relevant difference", "no significant difference", "unknown"]
"""On a method against another one. "no relevant difference" is significant, but below the smallest relevant one."""
Direction = Literal["lower", "higher"]
Name = TypeVar("Name", bound=Hashable)
Components = Sequence[tuple[float, float]]
"""(share of the variance, degrees of freedom) of each estimate."""

SIGNIFICANCE_LEVEL = 0.05
"""Family-wise error rate of the verdicts on a set of comparisons."""
FEWEST_SEEDS = 3
"""Seeds below this number are not tested. With two, one degree of freedom remains: a difference would have to be 12.7
standard errors, and a distribution-free test of two differences has no p-value below ½."""
_SMALLEST_P_VALUE = 1e-300
_LARGEST_RATIO = 50.0
"""Noncentrality at which the power of any test here exceeds 0.8, in units of its critical value."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Args:
        mean: of n numbers.
        low: lower end; None if there is no interval, as for n = 1.
        high: upper end; None if there is no interval.
        n: how many seeds.
        p_value: two-sided, of the hypothesis that the mean is 0; None if there is no test, as for n < 3.
        standard_error: of the mean; None if there is no interval.
        components: (share of the variance, degrees of freedom) of each independent estimate that the standard error is
            made of; empty if there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p_value: float | None = None
    standard_error: float | None = None
    components: Components = ()

    @property
    def half_width(self) -> float | None:
        """Half of the width of the interval; None if there is no interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def degrees_of_freedom(self) -> float | None:
        """Those of Satterthwaite (1946), 1 / Σ share²/freedom; None if there is no interval."""
        spread = sum(share**2 / freedom for share, freedom in self.components)
        return 1 / spread if spread else None


def critical_value(level: float, components: Components) -> float:
    """Return the two-sided critical value of mean / standard error at a significance level.

    It is c = √(Σ share t²), with the critical value t of Student's distribution for each component. This is the
    approximation of Cochran and Cox (1950) with squares. It is exact for one component. For two, Satterthwaite's
    degrees of freedom have levels up to 8 % at a nominal 5 % and 2.8 % at 0.5 %.

    Args:
        level: significance level.
        components: (share of the variance, degrees of freedom) of each estimate.

    Returns:
        The critical value.
    """
    # hypot does not overflow at the tiny levels of very significant differences.
    return math.hypot(*(math.sqrt(share) * float(stdtrit(freedom, level / 2)) for share, freedom in components))


def interval_from(mean: float, error: float, components: Components, n: int) -> Interval:
    """Return mean ± c · error at 95 %, with a p-value if n is at least `FEWEST_SEEDS`.

    If the error is 0 although the mean is not, the t-test does not apply, and the p-value is 2^(1 − n), that of the
    sign test of n equal signs.

    Args:
        mean: of n numbers.
        error: standard error of the mean.
        components: (share of the variance, degrees of freedom) of each estimate in the standard error.
        n: how many seeds.

    Returns:
        The interval.
    """
    half = critical_value(SIGNIFICANCE_LEVEL, components) * error
    if error > 1e-9 * abs(mean):
        p_value = _p_value(abs(mean) / error, components)
    else:
        p_value = 1.0 if mean == 0 else 2.0 ** (1 - n)
    return Interval(mean, mean - half, mean + half, n, p_value if n >= FEWEST_SEEDS else None, error, tuple(components))


def _p_value(ratio: float, components: Components) -> float:
    """Return the level whose critical value is the ratio: it lies between the p-values of the components."""
    alone = [max(float(2 * stdtr(freedom, -ratio)), _SMALLEST_P_VALUE) for share, freedom in components if share]
    low, high = min(alone), max(alone)
    if high <= low * (1 + 1e-12):
        return low

    def excess(logarithm: float) -> float:
        return critical_value(float(np.exp(logarithm)), components) - ratio

    ends = float(np.log(low)), float(np.log(high))
    if excess(ends[0]) <= 0 or excess(ends[1]) >= 0:  # by round-off, if one component has nearly all of the variance
        return high
    return float(np.exp(brentq(excess, *ends)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean with its Student t interval, mean ± t₀.₉₇₅(n − 1) s/√n.

    Args:
        values: n numbers, one per seed.

    Returns:
        The interval, without ends for n = 1 or a value that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1 or not np.isfinite(numbers).all():
        return Interval(mean, None, None, n)
    return interval_from(mean, float(numbers.std(ddof=1) / np.sqrt(n)), [(1.0, n - 1.0)], n)


def detectable_difference(difference: Interval, *, n_comparisons: int = 1, power: float = 0.8) -> float | None:
    """Return the true difference that the test of this one detects with a given probability.

    It is δ · standard error, with P(T > c) = power for T of the noncentral t distribution at δ, and the critical
    value c at the level 5 % / n_comparisons, which is the first step of Holm's method. For two components, T has
    Satterthwaite's degrees of freedom.

    Args:
        difference: the interval of a difference.
        n_comparisons: number of comparisons that are corrected for.
        power: the probability.

    Returns:
        The difference in the unit of the metric; None if there is no test or the standard error is 0.
    """
    error, freedom = difference.standard_error, difference.degrees_of_freedom
    if difference.p_value is None or not error or freedom is None:
        return None
    critical = critical_value(SIGNIFICANCE_LEVEL / n_comparisons, difference.components)
    ratio = brentq(lambda delta: float(nct.sf(critical, freedom, delta)) - power, 0.0, _LARGEST_RATIO * critical)
    return float(ratio) * error


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Return p-values adjusted by Holm's (1979) step-down method, which controls the family-wise error rate.

        p̃₍ᵢ₎ = max over j <= i of min(1, (m − j + 1) p₍ⱼ₎),  p₍₁₎ <= ... <= p₍ₘ₎

    Args:
        p_values: the m p-values by name.

    Returns:
        The adjusted p-values by name.
    """
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def verdicts(
    differences: Mapping[Name, Interval], better: Direction, *, smallest_relevant: float = 0.0
) -> dict[Name, Verdict]:
    """Return the verdict on each of several differences.

    The p-values are corrected by Holm's method, so that the probability of any false difference among these
    comparisons is at most 5 %.

    Args:
        differences: the interval of method − other for each comparison.
        better: which direction is better.
        smallest_relevant: a smaller difference is not relevant, even if it is significant; in the unit of the metric.

    Returns:
        The verdict by name; "unknown" if its difference has no p-value.
    """
    adjusted = holm({name: d.p_value for name, d in differences.items() if d.p_value is not None})
    found: dict[Name, Verdict] = {}
    for name, difference in differences.items():
        if name not in adjusted:
            found[name] = "unknown"
        elif adjusted[name] > SIGNIFICANCE_LEVEL:
            found[name] = "no significant difference"
        elif abs(difference.mean) < smallest_relevant:
            found[name] = "no relevant difference"
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
