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
        return _at(np.cumsum(self._in_order(values), -1), self.last)

    def expected(self, values: Floats) -> Floats:
        """At each place, the mean value of its group of ties: the expected value there over all orders of ties."""
        ordered = self._in_order(values)
        sums = np.cumsum(ordered, -1)
        before = _at(sums - ordered, self.first)
        means: Floats = (_at(sums, self.last) - before) / (self.last - self.first + 1)
        return means

    def _in_order(self, values: Floats) -> Floats:
        return values[self.order] if values.ndim == 1 else _at(values, self.order)


def falling(scores: Floats) -> Falling:
    """The rows in falling order of `scores`, (..., M)."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = _at(scores, order)
    step = ranked[..., 1:] != ranked[..., :-1]
    edge = np.ones((*ranked.shape[:-1], 1), dtype=bool)
    places = np.arange(ranked.shape[-1])
    first = np.maximum.accumulate(np.where(np.concatenate([edge, step], -1), places, 0), axis=-1)
    ends = np.where(np.concatenate([step, edge], -1), places, len(places))
    last = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    return Falling(order, first, last)


def _at(values: Floats, places: Integers) -> Floats:
    """values[..., places], each row at its own places; `np.take_along_axis` does the same, ten times slower."""
    lead, length = places.shape[:-1], places.shape[-1]
    offset = length * np.arange(int(np.prod(lead))).reshape(*lead, 1)
    taken: Floats = np.take(np.ascontiguousarray(values), places + offset)
    return taken
