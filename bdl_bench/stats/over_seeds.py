"""Means over seeds and rows with intervals that count both, for independent test rows and for a fixed test set.

If each seed has test rows of its own, the seeds are the sample: a t-test over the S means of the seeds. Rows within a
seed share its network, so they are no independent observations of a method.

If all seeds share R test rows, rows and seeds are crossed: y_sr = μ + seed_s + row_r + residual_sr. With the mean
squares of the two-way analysis of variance, A of seeds, B of rows and E of residuals,

    Var(mean) = (A + B − E) / (S R),

which is estimated without bias; it is taken as at least A/(S R) and B/(S R). A has S − 1 and B has R − 1 degrees of
freedom. `critical_value` combines them, with the shares A/(A + B) and B/(A + B) of the variance.

docs/benchmarks/statistics.md has the measured levels of these tests and of alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bdl_bench.stats.intervals import Components, Interval, interval_from
from bdl_bench.stats.ties import is_tie

__all__ = ["intervals_over_seeds", "paired_intervals"]

Floats = NDArray[np.float64]


def intervals_over_seeds(values: Sequence[Floats], *, same_rows: bool) -> list[Interval]:
    """Return the mean of each of K quantities with its 95 % interval.

    Args:
        values: one array (R, K) per seed, such as the scores of the test rows, or one row with a metric of them.
        same_rows: whether row r is the same in every seed, as for a fixed test set.

    Returns:
        K intervals over the S seeds, without ends for one seed, for a mean that is not finite, and for one row that all
        seeds share. For two seeds they have no p-value.

    Example:
        >>> import numpy as np
        >>> (found,) = intervals_over_seeds([np.array([[v]]) for v in (1.0, 2.0, 4.0)], same_rows=False)
        >>> f"{found.mean:.2f} ± {found.half_width:.2f}"
        '2.33 ± 3.79'
    """
    n = len(values)
    seeds = np.stack([value.mean(0) for value in values])
    means = seeds.mean(0)
    finite = np.isfinite(seeds).all(0)
    if n == 1 or (same_rows and len(values[0]) == 1):
        return [Interval(float(mean), None, None, n) for mean in means]
    cleaned = [np.where(finite, value, 0.0) for value in values]
    variances, components = _crossed(np.stack(cleaned)) if same_rows else _over_seeds(cleaned)
    return [
        interval_from(float(m), float(np.sqrt(v)), parts, n) if ok else Interval(float(m), None, None, n)
        for m, v, parts, ok in zip(means, variances, components, finite, strict=True)
    ]


def paired_intervals(values: Sequence[Floats], others: Sequence[Floats], *, same_rows: bool) -> list[Interval]:
    """Return the mean difference of each of K pairs with its 95 % interval and the p-value of its test.

    A difference of round-off is a tie: its p-value is 1.

    Args:
        values: one array (R, K) per seed, of the first method of each pair.
        others: arrays of the same shapes, of the second method of each pair.
        same_rows: whether row r is the same in every seed.

    Returns:
        K intervals of values − others.
    """
    with np.errstate(invalid="ignore"):  # inf − inf, whose mean is not finite and has no interval
        found = intervals_over_seeds([a - b for a, b in zip(values, others, strict=True)], same_rows=same_rows)
    means, other_means = (np.mean([part.mean(0) for part in parts], axis=0) for parts in (values, others))
    return [
        replace(interval, p_value=1.0) if interval.p_value is not None and is_tie(float(a), float(b)) else interval
        for interval, a, b in zip(found, means, other_means, strict=True)
    ]


def _over_seeds(values: list[Floats]) -> tuple[Floats, list[Components]]:
    """Return the variance of the mean over seeds, (K,), and its components."""
    variances = np.stack([value.mean(0) for value in values]).var(0, ddof=1) / len(values)
    return variances, [[(1.0, len(values) - 1.0)]] * len(variances)


def _crossed(values: Floats) -> tuple[Floats, list[Components]]:
    """Return the variance of the mean of (S, R, K) crossed values, (K,), and its components."""
    n_seeds, n_rows, _ = values.shape
    of_seeds, of_rows = values.mean(1), values.mean(0)
    residuals = values - of_seeds[:, None] - of_rows + of_rows.mean(0)
    seeds = n_rows * of_seeds.var(0, ddof=1)
    rows = n_seeds * of_rows.var(0, ddof=1)
    rest = np.square(residuals).sum((0, 1)) / ((n_seeds - 1) * (n_rows - 1))
    total = np.maximum(seeds + rows - rest, np.maximum(seeds, rows))
    share = np.divide(seeds, seeds + rows, out=np.ones_like(seeds), where=seeds + rows > 0)
    components: list[Components] = [[(float(s), n_seeds - 1.0), (float(1 - s), n_rows - 1.0)] for s in share]
    return total / (n_seeds * n_rows), components
