"""The paired bootstrap of `stats.bootstrap_difference` for many comparisons at once.

Drawing rows costs far more than averaging them, and the same draws serve every comparison over the same seeds and
numbers of rows: counts of the drawn rows, (draws, rows), times the differences, (rows, K), are all K averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bdl_bench.stats import Interval
from bdl_bench.stats.bootstrap import block_means

__all__ = ["bootstrap_columns"]

Floats = NDArray[np.float64]


def bootstrap_columns(differences: Sequence[Floats], *, n_resamples: int = 1000, seed: int = 0) -> list[Interval]:
    """95 % percentile interval of the mean of each column; one array (rows, K) of paired differences a seed.

    The draws, and so the intervals, are those of `bootstrap_difference(..., n_resamples=, seed=)`.
    """
    blocked = [block_means(d) for d in differences]
    picks, counts = _draws(tuple(len(d) for d in blocked), n_resamples, seed)
    drawn = np.empty((*picks.shape, blocked[0].shape[1]))
    means = np.mean([d.mean(0) for d in blocked], axis=0)
    for s, difference in enumerate(blocked):
        finite = np.where(np.isfinite(means), difference, 0.0)
        drawn[picks == s] = counts[s] @ finite / len(difference)
    lows, highs = np.quantile(drawn.mean(1), (0.025, 0.975), axis=0)
    return [_interval(*column, n=len(blocked)) for column in zip(means, lows, highs, strict=True)]


def _interval(mean: float, low: float, high: float, *, n: int) -> Interval:
    if not np.isfinite(mean):
        return Interval(float(mean), None, None, n)
    return Interval(float(mean), float(low), float(high), n)


@lru_cache(maxsize=2)
def _draws(lengths: tuple[int, ...], n_resamples: int, seed: int) -> tuple[NDArray[np.int64], list[Floats]]:
    """Which seed each draw takes, (n_resamples, seeds), and for each seed how often each of its rows is drawn."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(lengths), size=(n_resamples, len(lengths)))
    counts = []
    for s, length in enumerate(lengths):
        rows = rng.integers(length, size=(int((picks == s).sum()), length))
        places = rows + length * np.arange(len(rows))[:, None]
        counts.append(np.bincount(places.reshape(-1), minlength=rows.size).reshape(rows.shape).astype(np.float64))
    return picks, counts
