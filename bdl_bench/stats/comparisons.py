"""Comparisons of all methods by one metric: with the baseline, and of every pair, from which the best is judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from bdl_bench.stats.intervals import Direction, Interval, Verdict, verdicts
from bdl_bench.stats.over_seeds import paired_intervals

__all__ = ["Comparisons", "compare_methods", "distinct_seeds", "negated", "seed_groups"]

Floats = NDArray[np.float64]
Values = Mapping[str, Mapping[int, Floats]]
Copies = Mapping[str, Mapping[int, int]]
_PAIRS_AT_ONCE = 64
"""Pairs whose differences are held in memory at the same time."""


@dataclass(frozen=True)
class Comparisons:
    """All tests of one metric.

    Two families of tests have a family-wise error rate of 5 % each, by Holm's method. Comparisons with the baseline are
    one family. All pairs are the other one: the best method is chosen by the same data, so a comparison with it is
    corrected for every pair that it was chosen from.

    Args:
        with_baseline: verdict on each other method against the baseline; empty without a baseline.
        pairs: verdict on the first method of each pair against the second one.
        baseline_differences: method − baseline, with intervals that are not corrected.
        differences: first − second method of each pair, with intervals that are not corrected.
    """

    with_baseline: dict[str, Verdict] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    baseline_differences: dict[str, Interval] = field(default_factory=dict)
    differences: dict[tuple[str, str], Interval] = field(default_factory=dict)

    def with_method(self, other: str) -> dict[str, Verdict]:
        """Return the verdict on each method against one of them, corrected for all pairs.

        Args:
            other: the method that the others are compared with.

        Returns:
            The verdict by method, without methods that have no common seed with it.
        """
        found: dict[str, Verdict] = {}
        for (first, second), verdict in self.pairs.items():
            if second == other:
                found[first] = verdict
            elif first == other:
                found[second] = _REVERSED[verdict]
        return found

    def difference(self, method: str, other: str) -> Interval | None:
        """Return the interval of method − other.

        Args:
            method: name of a method.
            other: name of another method.

        Returns:
            The interval, not corrected; None if they have no common seed.
        """
        if (method, other) in self.differences:
            return self.differences[method, other]
        found = self.differences.get((other, method))
        return None if found is None else negated(found)


_REVERSED: dict[Verdict, Verdict] = {
    "better": "worse",
    "worse": "better",
    "no relevant difference": "no relevant difference",
    "no significant difference": "no significant difference",
    "unknown": "unknown",
}


def compare_methods(
    values: Values,
    better: Direction,
    *,
    same_rows: bool,
    baseline: str | None = None,
    copies: Copies | None = None,
    smallest_relevant: float = 0.0,
) -> Comparisons:
    """Return the tests of every pair of methods, over the seeds that both have.

    Args:
        values: `values[method][seed]`, (R,): contributions of the test rows to the metric, whose mean is the metric.
        better: which direction is better.
        same_rows: whether row r is the same in every seed.
        baseline: the method that all others are compared with; None or a missing one: none.
        copies: `copies[method][seed]`, the first seed with the same predictions; None: all predictions differ.
        smallest_relevant: the smallest relevant difference, in the unit of the metric.

    Returns:
        The comparisons. A pair without a common seed has none.
    """
    by_seeds: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for pair in combinations(values, 2):
        seeds = distinct_seeds([s for s in values[pair[0]] if s in values[pair[1]]], pair, copies or {})
        if seeds:
            by_seeds.setdefault(tuple(seeds), []).append(pair)
    found: dict[tuple[str, str], Interval] = {}
    for common, pairs in by_seeds.items():
        for chunk in (pairs[i : i + _PAIRS_AT_ONCE] for i in range(0, len(pairs), _PAIRS_AT_ONCE)):
            sides = [[_columns(values, [pair[i] for pair in chunk], s) for s in common] for i in (0, 1)]
            found |= zip(chunk, paired_intervals(*sides, same_rows=same_rows), strict=True)
    differences = {pair: found[pair] for pair in combinations(values, 2) if pair in found}
    against = _from_baseline(differences, baseline)
    return Comparisons(
        verdicts(against, better, smallest_relevant=smallest_relevant),
        verdicts(differences, better, smallest_relevant=smallest_relevant),
        against,
        differences,
    )


def seed_groups(seeds: Sequence[int], methods: Iterable[str], copies: Copies) -> dict[int, int]:
    """Return, for each seed, the first seed of its group: seeds in which one of the methods has identical predictions.

    Args:
        seeds: the seeds, in increasing order.
        methods: the methods that are compared.
        copies: `copies[method][seed]`, the first seed with the same predictions.

    Returns:
        The first seed of the group of each seed.

    Example:
        >>> seed_groups([0, 1, 2], ["map"], {"map": {0: 0, 1: 0, 2: 2}})
        {0: 0, 1: 0, 2: 2}
    """
    group = {seed: seed for seed in seeds}
    for method in methods:
        first_with: dict[int, int] = {}
        for seed in seeds:
            other = first_with.setdefault(copies.get(method, {}).get(seed, seed), seed)
            joined = {group[seed], group[other]}
            group = {s: min(joined) if g in joined else g for s, g in group.items()}
    return group


def distinct_seeds(seeds: Sequence[int], methods: Iterable[str], copies: Copies) -> list[int]:
    """Return the first seed of each group of `seed_groups`.

    Args:
        seeds: the seeds, in increasing order.
        methods: the methods that are compared.
        copies: `copies[method][seed]`, the first seed with the same predictions.

    Returns:
        The seeds that count in a comparison of these methods.
    """
    return list(dict.fromkeys(seed_groups(seeds, methods, copies).values()))


def _columns(values: Values, methods: Sequence[str], seed: int) -> Floats:
    return np.stack([values[method][seed] for method in methods], axis=1)


def _from_baseline(differences: Mapping[tuple[str, str], Interval], baseline: str | None) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    for (first, second), interval in differences.items():
        if second == baseline:
            found[first] = interval
        elif first == baseline:
            found[second] = negated(interval)
    return found


def negated(interval: Interval) -> Interval:
    """Return the interval of the opposite difference.

    Args:
        interval: of a − b.

    Returns:
        That of b − a.
    """
    low = None if interval.high is None else -interval.high
    high = None if interval.low is None else -interval.low
    return replace(interval, mean=-interval.mean, low=low, high=high)
