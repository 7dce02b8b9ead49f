"""What loaders yield: batches with targets, and queries that may have none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from estimators.batch import Batch, Loader, split_batch
from estimators.pytrees import PyTree, n_rows

__all__ = ["Loader", "Query", "as_query", "queries", "rows"]


def rows(loader: Loader) -> Iterator[Batch]:
    """The batches of a loader, each as (x, y)."""
    return (split_batch(item) for item in loader)


@dataclass(frozen=True)
class Query:
    """Inputs to be predicted, and their targets where there are any."""

    x: PyTree
    y: Tensor | None

    def __len__(self) -> int:
        return n_rows(self.x)


def queries(loader: Loader) -> Iterator[Query]:
    """The batches of a loader of (x, y), of x alone, or of dicts with or without "labels"."""
    return (as_query(item) for item in loader)


def as_query(item: object) -> Query:
    """One item of a loader."""
    if isinstance(item, Tensor) or (isinstance(item, dict) and "labels" not in item):
        return Query(item, None)
    batch = split_batch(item)
    return Query(batch.x, batch.y)
