"""Two-level paired bootstrap: seeds drawn with replacement, then rows within each, the same for every comparison.

Drawing rows costs more than averaging them. The counts of the drawn rows, (resamples, rows), times the differences,
(rows, K), give the averages of all K comparisons at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from bdl_bench.stats.intervals import Interval

__all__ = ["bootstrap_differences"]

Floats = NDArray[np.float64]
_BLOCKS = 2000
"""Rows beyond this number are averaged in so many blocks first, which keeps the variance of the mean."""


def bootstrap_differences(differences: Sequence[Floats], *, n_resamples: int = 1000, seed: int = 0) -> list[Interval]:
    """Return the 95 % percentile interval of the mean of each of K paired differences.

    Args:
        differences: one array (M, K) per seed: row scores of K methods minus those of another method.
        n_resamples: number of resamples.
        seed: of the resampling. Equal seeds and numbers of rows give the same resamples.

    Returns:
        K intervals, without ends if the mean is not finite. Their p-values use the normal distribution with the
        standard deviation of the resampled means, since shares of 1,000 resamples are too coarse to be corrected.
    """
    blocked = [_block_means(difference) for difference in differences]
    picks, counts = _resamples(tuple(map(len, blocked)), n_resamples, seed)
    drawn = np.empty((*picks.shape, blocked[0].shape[1]))
    means = np.mean([d.mean(0) for d in blocked], axis=0)
    for s, difference in enumerate(blocked):
        finite = np.where(np.isfinite(means), difference, 0.0)
        drawn[picks == s] = counts[s] @ finite / len(difference)
    return [_interval(float(m), resampled, len(blocked)) for m, resampled in zip(means, drawn.mean(1).T, strict=True)]


def _interval(mean: float, resampled: Floats, n: int) -> Interval:
    """Return the interval of one difference from its mean in each resample, (n_resamples,)."""
    if not np.isfinite(mean):
        return Interval(mean, None, None, n)
    low, high = np.quantile(resampled, (0.025, 0.975))
    error = resampled.std()
    p_value = float(2 * norm.sf(abs(mean) / error)) if error > 1e-12 * abs(mean) else float(mean == 0)
    return Interval(mean, float(low), float(high), n, p_value)


@lru_cache(maxsize=2)
def _resamples(lengths: tuple[int, ...], n_resamples: int, seed: int) -> tuple[NDArray[np.int64], list[Floats]]:
    """Return the seed at each position of each resample, (n_resamples, seeds), and how often each row is drawn."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(lengths), size=(n_resamples, len(lengths)))
    counts = []
    for s, length in enumerate(lengths):
        rows = rng.integers(length, size=(int((picks == s).sum()), length))
        offsets = rows + length * np.arange(len(rows))[:, None]
        counts.append(np.bincount(offsets.reshape(-1), minlength=rows.size).reshape(rows.shape).astype(np.float64))
    return picks, counts


def _block_means(values: Floats) -> Floats:
    """Return the means of at most 2,000 blocks of consecutive rows."""
    if len(values) <= _BLOCKS:
        return values
    return np.array([block.mean(0) for block in np.array_split(values, _BLOCKS)])
