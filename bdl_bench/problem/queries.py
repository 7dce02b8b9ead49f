"""What loaders yield: batches with targets, and queries that may have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.data.batch import Batch, Loader, is_mapping, split_batch
from estimators.data.inputs import as_inputs
from estimators.numerics.pytrees import ALL_ROWS, PyTree, RowLayout, copied, n_rows, row_tensors

__all__ = ["Loader", "Query", "as_query", "moved", "queries", "rewind", "rows"]


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


def queries(loader: Loader, layout: RowLayout = ALL_ROWS) -> Iterator[Query]:
    """The batches of a loader of (x, y), of x alone, or of dicts with or without "labels".

    Args:
        loader: of a problem.
        layout: which tensors of the inputs have rows, `Problem.layout`; without it, shapes tell them batch by batch.

    Raises:
        DataError: for an item that is no batch, or without targets and with tensors of different numbers of rows.
    """
    return (as_query(item, layout) for item in loader)


def as_query(item: object, layout: RowLayout = ALL_ROWS) -> Query:
    """One item of a loader; [x], which a DataLoader yields for TensorDataset(x), is x alone.

    Args and errors are those of `queries`. Tensors that rows share are marked in the inputs.
    """
    if isinstance(item, (tuple, list)) and len(item) == 1 and (isinstance(item[0], Tensor) or is_mapping(item[0])):
        return as_query(item[0], layout)
    named = is_mapping(item)
    if isinstance(item, Tensor) or (named and not {"labels", "label"} & as_inputs(item).keys()):
        return Query(layout.mark(copied(as_inputs(item))), None)
    batch = split_batch(item).copy()
    rows_fit = len(batch) in {len(tensor) for tensor in row_tensors(batch.x)}
    return Query(layout.mark(batch.x, len(batch)) if rows_fit else batch.x, batch.y)


def moved(item: object, device: str | torch.device) -> Any:  # noqa: ANN401
    """One item of a loader with its tensors on a device; mappings and dataclasses become dicts."""
    if is_mapping(item):
        item = as_inputs(item)
    elif isinstance(item, (tuple, list)):
        item = tuple(as_inputs(part) if is_mapping(part) else part for part in item)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), item)


_BEGINNINGS: WeakKeyDictionary[torch.Generator, Tensor] = WeakKeyDictionary()


def rewind(loaders: Iterable[Loader]) -> None:
    """Put generators that loaders shuffle by back to where they were at the first call: no use moves the next."""
    for loader in loaders:
        inner = getattr(loader, "loader", loader)  # on another device
        for holder in (inner, getattr(inner, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.set_state(_BEGINNINGS.setdefault(generator, generator.get_state()))
