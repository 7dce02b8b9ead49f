"""What loaders yield: batches with targets, and queries that may have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from estimators.batch import Batch, Loader, split_batch
from estimators.pytrees import PyTree, n_rows

__all__ = ["Loader", "Query", "as_query", "queries", "rewind", "rows"]


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
    """The batches of a loader of (x, y), of x alone (also as [x]), or of dicts with or without "labels"."""
    return (as_query(item) for item in loader)


def as_query(item: object) -> Query:
    """One item of a loader; [x], which a DataLoader yields for TensorDataset(x), is x alone."""
    if isinstance(item, (tuple, list)) and len(item) == 1 and isinstance(item[0], (Tensor, dict)):
        return as_query(item[0])
    if isinstance(item, Tensor) or (isinstance(item, dict) and "labels" not in item):
        return Query(item, None)
    batch = split_batch(item)
    return Query(batch.x, batch.y)


_BEGINNINGS: WeakKeyDictionary[torch.Generator, Tensor] = WeakKeyDictionary()


def rewind(loaders: Iterable[Loader]) -> None:
    """Put generators that loaders shuffle by back to where they were at the first call: no use moves the next."""
    for loader in loaders:
        inner = getattr(loader, "loader", loader)  # on another device
        for holder in (inner, getattr(inner, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.set_state(_BEGINNINGS.setdefault(generator, generator.get_state()))
