"""Rows in falling order of a score, with what ties need. All works along the last axis, for many resamples at once.

Ties are resolved in one of two ways, and neither depends on the order of the rows. A *threshold* takes a group of ties
whole. An *expectation* averages over all orders of the ties: each place of a group then holds the mean of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Falling", "falling"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Falling:
    """Places 0, 1, ... of rows in falling order of their score, (..., M).

    `order`: the row at each place; `first`, `last`: the first and last place of the group of ties that it is in.
    """

    order: Integers
    first: Integers
    last: Integers

    def accepted(self, values: Floats) -> Floats:
        """At each place, the sum of values over the rows whose score is at least the one there, (..., M)."""
        return np.take_along_axis(np.cumsum(self._in_order(values), -1), self.last, -1)

    def expected(self, values: Floats) -> Floats:
        """At each place, the mean value of its group of ties: the expected value there over all orders of ties."""
        ordered = self._in_order(values)
        sums = np.cumsum(ordered, -1)
        before = np.take_along_axis(sums - ordered, self.first, -1)
        means: Floats = (np.take_along_axis(sums, self.last, -1) - before) / (self.last - self.first + 1)
        return means

    def _in_order(self, values: Floats) -> Floats:
        return np.take_along_axis(np.broadcast_to(values, self.order.shape), self.order, -1)


def falling(scores: Floats) -> Falling:
    """The rows in falling order of `scores`, (..., M)."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, -1)
    step = ranked[..., 1:] != ranked[..., :-1]
    edge = np.ones((*ranked.shape[:-1], 1), dtype=bool)
    places = np.arange(ranked.shape[-1])
    first = np.maximum.accumulate(np.where(np.concatenate([edge, step], -1), places, 0), axis=-1)
    ends = np.where(np.concatenate([step, edge], -1), places, len(places))
    last = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    return Falling(order, first, last)
