"""Which tensors of the inputs have rows, if all batches have one size: found by computing one row alone.

A matrix of four rows that the rows of a batch share cannot be told by its shape from a tensor with rows if every batch
has four rows. But the output of a row alone is that of the row among others only if its shared inputs are kept whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, combinations, islice

import torch
from torch import Tensor

from estimators.errors import EstimatorError
from estimators.numerics.pytrees import PyTree, RowLayout, select_rows

__all__ = ["resolve_layout"]

_MOST_TRIALS = 32
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference of a row alone and among others, relative to the largest output; elsewhere 1e-2."""
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, EstimatorError)


def resolve_layout(layout: RowLayout, x: PyTree, rows: int, outputs: Callable[[PyTree], Tensor]) -> RowLayout:
    """Return the layout in which the first and the last row alone have the outputs that they have in the batch.

    The layout itself if batches of several sizes have decided, if every tensor may have rows, or if no choice fits, as
    for a network whose rows depend on each other.

    Args:
        layout: of all batches.
        x: the inputs of one batch.
        rows: its number of rows.
        outputs: the model, marked inputs -> f (B, ...).
    """
    names = sorted(layout.with_rows - layout.unequal)
    if len(layout.sizes) > 1 or len(names) < 2 or rows < 2:
        return layout
    try:
        among = outputs(layout.mark(x, rows))
    except _FAILURES:
        return layout  # the checks of the data say why
    subsets = chain.from_iterable(combinations(names, k) for k in range(len(names)))
    for shared in islice(subsets, _MOST_TRIALS):
        tried = replace(layout, unequal=layout.unequal | set(shared))
        if all(_fits(tried, x, rows, row, among, outputs) for row in (0, rows - 1)):
            return tried
    return layout


def _fits(
    layout: RowLayout, x: PyTree, rows: int, row: int, among: Tensor, outputs: Callable[[PyTree], Tensor]
) -> bool:
    """Return whether a row alone has the output that it has among the others."""
    try:
        alone = outputs(select_rows(layout.mark(x, rows), slice(row, row + 1)))
    except _FAILURES:
        return False
    expected = among[row : row + 1]
    if alone.shape != expected.shape:
        return False
    allowed = _TOLERANCE.get(among.dtype, 1e-2) * among.abs().max()
    return bool(((alone - expected).abs() <= allowed).all())
