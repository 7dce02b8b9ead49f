"""Items of loaders: batches with targets, and queries that may have no targets."""

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
    """Return the batches of a loader as (x, y), copied, since a loader may reuse one buffer."""
    return (split_batch(item).copy() for item in loader)


@dataclass(frozen=True)
class Query:
    """Inputs to predict at, and their targets, or None."""

    x: PyTree
    y: Tensor | None

    def __len__(self) -> int:
        return n_rows(self.x)


def queries(loader: Loader, layout: RowLayout = ALL_ROWS) -> Iterator[Query]:
    """Return the items of a loader of (x, y), of x alone, or of dicts with or without "labels".

    `layout` says which tensors of the inputs have rows, as `Problem.layout`; by default the shapes of a batch decide.
    """
    return (as_query(item, layout) for item in loader)


def as_query(item: object, layout: RowLayout = ALL_ROWS) -> Query:
    """Return one item of a loader as a query, with the tensors marked that rows share.

    The item [x], which a DataLoader yields for TensorDataset(x), is x alone.
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
    """Return one item of a loader with its tensors on a device; mappings and dataclasses become dicts."""
    if is_mapping(item):
        item = as_inputs(item)
    elif isinstance(item, (tuple, list)):
        item = tuple(as_inputs(part) if is_mapping(part) else part for part in item)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), item)


_FIRST_STATES: WeakKeyDictionary[torch.Generator, Tensor] = WeakKeyDictionary()


def rewind(loaders: Iterable[Loader]) -> None:
    """Reset the generators of loaders to their state at the first call, so that all methods see the same order."""
    for loader in loaders:
        inner = getattr(loader, "loader", loader)  # of `_OnDevice`
        for holder in (inner, getattr(inner, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.set_state(_FIRST_STATES.setdefault(generator, generator.get_state()))
