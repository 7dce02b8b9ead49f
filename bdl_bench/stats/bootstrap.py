"""Two-level paired bootstrap: seeds drawn with replacement, then rows within each, the same for both methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.metric import Sample, flat
from bdl_bench.stats.intervals import Interval

__all__ = ["block_means", "bootstrap_difference", "bootstrap_replicates", "bootstrap_statistic", "replicate_difference"]

Floats = NDArray[np.float64]
Statistic = Callable[[Sample], Floats]
_BLOCKS = 2000
_ENTRIES = 2**14


def bootstrap_difference(
    scores: Sequence[Floats], others: Sequence[Floats], *, n_resamples: int = 1000, seed: int = 0
) -> Interval:
    """95 % percentile interval of the mean of scores − others, one array of per-example scores a seed.

    Arrays of more than 2,000 examples are averaged in that many blocks first, which leaves the variance of the mean.
    """
    differences = [block_means(a - b) for a, b in zip(scores, others, strict=True)]
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


def bootstrap_statistic(
    samples: Sequence[Sample],
    others: Sequence[Sample],
    statistic: Statistic,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % interval of the mean difference of a statistic that is no mean over rows, one sample of each method a seed.

    `statistic` maps arrays (..., M) to (...), anew for each resample, whatever the order of the rows (`Metric.sample`,
    `Metric.statistic`).
    """
    drawn = [bootstrap_replicates(s, statistic, n_resamples=n_resamples, seed=seed) for s in (samples, others)]
    values = [[float(statistic(flat(sample))) for sample in method] for method in (samples, others)]
    return replicate_difference((values[0], drawn[0]), (values[1], drawn[1]))


def bootstrap_replicates(
    samples: Sequence[Sample], statistic: Statistic, *, n_resamples: int = 1000, seed: int = 0
) -> Floats:
    """The mean of a statistic over seeds in each resample, (n_resamples,).

    What is drawn depends on `seed` and the numbers of seeds and rows alone: replicates of two methods on the same rows
    are paired, so that each method needs them once for all its comparisons.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(samples), size=(n_resamples, len(samples)))
    drawn = np.empty(picks.shape)
    for s, sample in enumerate(samples):
        places = picks == s
        params = [statistic(resample) for resample in _resamples(sample, int(places.sum()), rng)]
        drawn[places] = np.concatenate([np.empty(0), *params])
    means: Floats = drawn.mean(-1)
    return means


def replicate_difference(method: tuple[Sequence[float], Floats], other: tuple[Sequence[float], Floats]) -> Interval:
    """95 % interval of the difference of two methods, each the values at its seeds and their paired replicates.

    The replicates' quantiles are taken about their mean and put about the difference: resampling repeats rows, which
    makes a calibration error larger than it is, and more so for the better method.
    """
    difference = float(np.mean(method[0]) - np.mean(other[0]))
    spread = method[1] - other[1]
    if not (np.isfinite(difference) and np.isfinite(spread).all()):
        return Interval(difference, None, None, len(method[0]))
    low, high = np.quantile(spread, (0.025, 0.975)) - spread.mean()
    return Interval(difference, difference + float(low), difference + float(high), len(method[0]))


def _resamples(sample: Sample, count: int, rng: np.random.Generator) -> Iterator[Sample]:
    """`count` resamples of the rows of each group, (n, M), as many at a time as the processor's cache holds.

    The rows of a resample are in falling order of the first array, which spares most statistics their sort.
    """
    groups = [_Falling(group) for group in sample]
    step = max(1, _ENTRIES // sum(group.rows for group in groups))
    for start in range(0, count, step):
        n = min(step, count - start)
        yield tuple(group.drawn(rng.integers(group.rows, size=(n, group.rows), dtype=np.int32)) for group in groups)


class _Falling:
    """A group of rows in falling order of the first value of each."""

    def __init__(self, group: tuple[Floats, ...]) -> None:
        self.rows = len(group[0])
        order = np.argsort(-group[0].reshape(self.rows, -1)[:, 0], kind="stable")
        self.arrays = tuple(array[order] for array in group)
        self.place = np.argsort(order).astype(np.int32)

    def drawn(self, picked: NDArray[np.int32]) -> tuple[Floats, ...]:
        """The picked rows (n, M) of each array, (n, M) or its outputs in one axis."""
        places = np.sort(self.place[picked], axis=-1)
        return tuple(array[places].reshape(len(picked), -1) for array in self.arrays)


def block_means(values: Floats) -> Floats:
    """At most 2,000 means of blocks of rows, of one size but for one row, which leaves the variance of the mean."""
    if len(values) <= _BLOCKS:
        return values
    return np.array([block.mean(0) for block in np.array_split(values, _BLOCKS)])
