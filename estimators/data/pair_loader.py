"""Batches as a loader of pairs, for code that reads a user's loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from estimators.data.batch import Batch
from estimators.numerics.pytrees import PyTree

__all__ = ["PairLoader"]


@dataclass(frozen=True)
class PairLoader:
    """A re-iterable loader of (x, y) from batches."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[tuple[PyTree, Tensor]]:
        return ((batch.x, batch.y) for batch in self.batches)
