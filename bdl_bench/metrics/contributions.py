"""Contributions of test rows to a metric: numbers whose mean is the metric and whose spread is that of the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.metric import Arrays, Metric

__all__ = ["row_contributions"]

Floats = NDArray[np.float64]
_BLOCKS, _JACKKNIFE_BLOCKS = 200, 20
"""Numbers of blocks of consecutive rows. Rows of one sequence or image follow each other, so that blocks of many rows
hold most of their correlation. 20 is the number of times that a metric which is not a mean is computed again."""


def row_contributions(metric: Metric, arrays: Arrays) -> Floats:
    """Return numbers with the metric as their mean, one per row, or per block of rows if there are many.

    For a mean over rows these are its scores, for a root of a mean their linearization

        √m + (sᵣ − m) / (2 √m),   m the mean of the scores sᵣ.

    For any other metric θ they are pseudo-values of the jackknife with one of G blocks left out, moved to the mean θ:

        θ + (G − 1) (mean θ₍₋ₕ₎ − θ₍₋ᵍ₎).

    Args:
        metric: the metric.
        arrays: predictions and targets of the test rows and of the other sets that the metric uses, by name.

    Returns:
        (R,) for R rows or blocks.

    Example:
        >>> import numpy as np
        >>> mae = Metric("reg/MAE", "MAE", "mean absolute error", "lower", lambda a: abs(a["mean"] - a["targets"]))
        >>> row_contributions(mae, {"mean": np.array([1.0, 2.0]), "targets": np.zeros(2)})
        array([1., 2.])
    """
    if metric.scores is not None:
        scores = metric.scores(arrays)
        return _in_blocks(_root(scores) if metric.root else scores)
    value = metric.value(arrays)
    n_blocks = min(_JACKKNIFE_BLOCKS, _rows(arrays))
    if n_blocks == 1 or not np.isfinite(value):
        return np.array([value])
    without = np.array([metric.value(_without_block(arrays, block, n_blocks)) for block in range(n_blocks)])
    contributions: Floats = value + (n_blocks - 1) * (without.mean() - without)
    return contributions


def _root(scores: Floats) -> Floats:
    mean = float(scores.mean())
    root = np.sqrt(mean)
    return root + (scores - mean) / (2 * root) if root > 0 else np.zeros_like(scores)


def _in_blocks(scores: Floats) -> Floats:
    """Return one contribution per row, or per block of at least two rows; blocks differ in size by one row at most."""
    if len(scores) < 2 * _BLOCKS:
        return scores
    mean = scores.mean()
    blocks = np.array_split(scores - mean if np.isfinite(mean) else scores, _BLOCKS)
    offset = mean if np.isfinite(mean) else 0.0
    return offset + np.array([block.sum() for block in blocks]) * (_BLOCKS / len(scores))


def _rows(arrays: Arrays) -> int:
    return len(next(array for name, array in arrays.items() if "/" not in name))


def _without_block(arrays: Arrays, block: int, n_blocks: int) -> dict[str, Floats]:
    """Return the arrays without one block of the test rows, and of the rows of every other set but validation.

    Curves of a decision have no rows.
    """
    kept: dict[str, Floats] = {}
    for name, array in arrays.items():
        if name.startswith(("validation/", "decision/")) or (len(array) < 2 * n_blocks and "/" in name):
            kept[name] = array
        else:
            edges = np.linspace(0, len(array), n_blocks + 1).astype(int)
            kept[name] = np.delete(array, slice(edges[block], edges[block + 1]), axis=0)
    return kept
