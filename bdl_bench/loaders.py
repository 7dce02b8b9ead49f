"""What loaders yield: batches with targets, and queries that may have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from estimators.batch import Batch, Loader, is_mapping, split_batch
from estimators.inputs import as_inputs
from estimators.pytrees import ALL_ROWS, PyTree, copied, n_rows, row_tensors

__all__ = ["Loader", "Query", "as_query", "queries", "rewind", "rows"]


def rows(loader: Loader) -> Iterator[Batch]:
    """The batches of a loader as (x, y), with tensors of their own: a loader may fill one buffer again and again."""
    return (split_batch(item).copy() for item in loader)


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
    """One item of a loader; [x], which a DataLoader yields for TensorDataset(x), is x alone."""
    if isinstance(item, (tuple, list)) and len(item) == 1 and (isinstance(item[0], Tensor) or is_mapping(item[0])):
        return as_query(item[0])
    named = is_mapping(item)
    if isinstance(item, Tensor) or (named and not {"labels", "label"} & as_inputs(item).keys()):
        return Query(_marked(copied(as_inputs(item)), None), None)
    batch = split_batch(item).copy()
    return Query(_marked(batch.x, len(batch)), batch.y)


def _marked(x: PyTree, n: int | None) -> PyTree:
    """The inputs with the tensors marked that rows share; as they are, if their number is in none or not known."""
    lengths = {len(tensor) for tensor in row_tensors(x)}
    if n is None and len(lengths) == 1:
        (n,) = lengths
    return ALL_ROWS.mark(x, n) if n in lengths else x


_BEGINNINGS: WeakKeyDictionary[torch.Generator, Tensor] = WeakKeyDictionary()


def rewind(loaders: Iterable[Loader]) -> None:
    """Put generators that loaders shuffle by back to where they were at the first call: no use moves the next."""
    for loader in loaders:
        inner = getattr(loader, "loader", loader)  # on another device
        for holder in (inner, getattr(inner, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.set_state(_BEGINNINGS.setdefault(generator, generator.get_state()))
