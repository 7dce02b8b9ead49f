"""The rows of a loader, read once and stored, so that every method and metric has the same rows in one order.

A loader that shuffles gives another order on every pass, so predictions of two passes cannot be paired by position.
Each set of a problem is therefore read once. A DataLoader that shuffles is read in the order of its data set. Rows of
any other loader that shuffles are sorted by their digests, which do not depend on the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from bdl_bench.problem.loader_checks import located
from bdl_bench.problem.queries import Loader, Query, as_query, moved
from bdl_bench.problem.row_identity import Digests
from estimators.errors import DataError, NonDeterministicError
from estimators.numerics.pytrees import ALL_ROWS, RowLayout, plain_inputs, tensors_of
from estimators.persistence.checksums import bits_by_row, row_hashes
from estimators.runtime.rng import preserved_random_state, seeded_random_state

__all__ = [
    "AS_GIVEN",
    "HELD_OUT_BYTES",
    "TRAIN_BYTES",
    "Budget",
    "CheckedRows",
    "KeptRows",
    "description_of_order",
    "kept_rows",
    "kept_train",
]

HELD_OUT_BYTES = 2**31
"""Largest size of all sets of a problem that are not trained on; sets beyond it are read again for every use."""
TRAIN_BYTES = 2**28
"""Largest size of training rows, that of `estimators.data.training_data`."""

AS_GIVEN, DATASET_ORDER = "the loader's own", "the data set's (the loader shuffles)"
SORTED = "sorted by row digest (the loader shuffles)"
READ_AGAIN = "read from the loader on every pass"
_ANOTHER_SEED = 1_000_003
"""Random state of the second pass, so that a loader that shuffles gives another order."""

Positions = NDArray[np.int64]


@dataclass
class Budget:
    """Bytes that may still be stored."""

    bytes_left: int = HELD_OUT_BYTES


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Batches that were read once and stored.

    Args:
        name: of the set, as in `Problem.sets`.
        batches: of inputs with their targets; iteration goes over them.
        digests: of every row, in the order of the batches.
        loader_order: index with which `rows_of_batches[loader_order]` is in the order of the loader, as records are.
            None: the batches are in this order.
        order_description: which order that is, in words.
        sizes: rows in each batch of the loader, for error messages.
        device: to which batches are moved as they are read; None: they are not moved.
    """

    name: str
    batches: tuple[Query, ...]
    digests: Digests
    loader_order: Positions | None = None
    order_description: str = AS_GIVEN
    sizes: tuple[int, ...] = ()
    device: str | torch.device | None = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            x = plain_inputs(batch.x)
            item = x if batch.y is None else (x, batch.y)
            yield item if self.device is None else moved(item, self.device)

    def on(self, device: str | torch.device) -> KeptRows:
        """Return the same rows, moved to a device batch by batch."""
        return replace(self, device=device)

    def describe(self, index: int) -> str:
        """Return a description of the row with this index: by batch and row if the loader does not shuffle."""
        row = index if self.loader_order is None else int(np.flatnonzero(self.loader_order == index)[0])
        if self.order_description == SORTED:
            return f"{self.name} loader, row {row} in the order of row digests"
        batch = int(np.searchsorted(np.cumsum(self.sizes), row, side="right"))
        return f"{self.name} loader, batch {batch}, row {row - sum(self.sizes[:batch])} of it"


@dataclass(frozen=True, eq=False)
class CheckedRows:
    """The rows of a loader that are too many to be stored. Every pass is checked against the digests of the first.

    Args:
        name: of the set, as in `Problem.sets`.
        loader: of the set.
        digests: of every row in the first pass.
        order_description: the order of the rows, in words.
        device: to which batches are moved as they are read; None: they are not moved.
        layout: which tensors of the inputs have rows.

    Raises:
        NonDeterministicError: during iteration, for a pass with other rows or another order.
    """

    name: str
    loader: Loader
    digests: Digests
    order_description: str = AS_GIVEN
    device: str | torch.device | None = None
    layout: RowLayout = ALL_ROWS
    loader_order: None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for number, item in enumerate(self.loader):
            with located(self.name, number):
                query = as_query(item, self.layout)
            found = row_hashes(query.x, query.y)
            if found != self.digests[start : start + len(found)]:
                raise self._changed_rows(f"other rows in batch {number} (rows {start} to {start + len(found) - 1})")
            start += len(found)
            yield item if self.device is None else moved(item, self.device)
        if start != len(self.digests):
            raise self._changed_rows(f"{start} rows, {len(self.digests)} in the first pass")

    def on(self, device: str | torch.device) -> CheckedRows:
        """Return the same rows, moved to a device batch by batch."""
        return replace(self, device=device)

    def describe(self, index: int) -> str:
        """Return a description of the row with this index."""
        return f"{self.name} loader, row {index}"

    def _changed_rows(self, received: str) -> NonDeterministicError:
        return NonDeterministicError(
            f"a {self.name} loader with the same rows in the same order on every pass, since its rows are too many to "
            f"be stored (more than {HELD_OUT_BYTES / 2**30:g} GiB with the other sets)",
            received=received,
            remedy="shuffle=False for rows that are not trained on, or fewer of them.",
        )


def kept_rows(name: str, loader: Loader, budget: Budget, layout: RowLayout = ALL_ROWS) -> KeptRows | CheckedRows:
    """Read a loader of rows that are not trained on, and store the rows as far as the budget allows.

    Rows are regrouped into batches in the order of their digests if possible. A loader that shuffles then gives the
    same predictions to the last bit, also of methods that depend on the batch; `loader_order` undoes it. Stored rows
    are returned unchanged.

    Raises:
        DataError: for an item that is not a batch, or a loader without rows; it names the set and the batch.
        NonDeterministicError: if a second pass has other rows.
    """
    if isinstance(loader, (KeptRows, CheckedRows)):
        return loader
    found = _first_pass(name, loader, budget.bytes_left, layout)
    if found.batches is None:
        return CheckedRows(name, found.loader, found.digests, found.order_description, layout=layout)
    budget.bytes_left -= found.size
    shuffles = _shuffles(name, found, layout)
    regrouped = _by_digest(found.batches, found.digests)
    description, sizes = SORTED if shuffles else found.order_description, tuple(map(len, found.batches))
    if regrouped is not None:
        batches, digests, order = regrouped
        return KeptRows(name, batches, digests, None if shuffles else order, description, sizes)
    batches, digests = _sorted_batches(found.batches) if shuffles else (found.batches, found.digests)
    return KeptRows(name, batches, digests, None, description, sizes)


def kept_train(loader: Loader, layout: RowLayout = ALL_ROWS) -> Loader:
    """Return training rows in the same order on every pass, or the loader itself if that is impossible.

    Batches of a loader that does not shuffle are not regrouped. The loader itself is returned if rows differ between
    passes (random augmentation, `drop_last`) or are more than the trainer stores.
    """
    if isinstance(loader, (KeptRows, CheckedRows)):
        return loader
    found = _first_pass("train", loader, TRAIN_BYTES, layout)
    if found.batches is None:
        return loader
    try:
        shuffles = _shuffles("train", found, layout)
    except NonDeterministicError:
        return loader
    sizes = tuple(map(len, found.batches))
    if not shuffles:
        return KeptRows("train", found.batches, found.digests, None, found.order_description, sizes)
    regrouped = _by_digest(found.batches, found.digests)
    batches, digests = regrouped[:2] if regrouped is not None else _sorted_batches(found.batches)
    return KeptRows("train", batches, digests, None, SORTED, sizes)


@dataclass(frozen=True)
class _Pass:
    """The result of the first pass; `batches` is None if they are too large."""

    loader: Loader
    order_description: str
    batches: tuple[Query, ...] | None
    digests: Digests
    size: int


def _first_pass(name: str, loader: Loader, limit: int, layout: RowLayout) -> _Pass:
    ordered = _in_dataset_order(loader)
    kept: list[Query] | None = []
    digests: Digests = []
    size = 0
    with preserved_random_state():
        for number, item in enumerate(ordered):
            with located(name, number):
                query = as_query(item, layout)
            digests += row_hashes(query.x, query.y)
            size += _size(query)
            if kept is not None:
                kept.append(query)  # `as_query` has copied the tensors: the loader may reuse its buffers
            if size > limit:
                kept = None
    if not digests:
        raise DataError(
            f"a {name} loader that yields at least one row",
            received="an empty one",
            remedy="check the data set, drop_last and the sampler; pass a re-iterable loader, not an iterator.",
        )
    description = AS_GIVEN if ordered is loader else DATASET_ORDER
    return _Pass(ordered, description, None if kept is None else tuple(kept), digests, size)


def _shuffles(name: str, first: _Pass, layout: RowLayout) -> bool:
    """Return whether a second pass has another order; raise NonDeterministicError if it has other rows."""
    if isinstance(first.loader, (list, tuple)):
        return False
    again: Digests = []
    with seeded_random_state(_ANOTHER_SEED):  # from the state of the first pass, the same order would be drawn
        for item in first.loader:
            query = as_query(item, layout)
            again += row_hashes(query.x, query.y)
    if again == first.digests:
        return False
    if sorted(again) != sorted(first.digests):
        new = len(set(again) - set(first.digests))
        raise NonDeterministicError(
            f"the same rows in every pass over the {name} loader (their order may differ)",
            received=f"{len(first.digests)} rows in the first pass, {len(again)} in the second, {new} of them new",
            remedy="a re-iterable loader, drop_last=False when shuffling, no random augmentation, a sampler without "
            "replacement, and rows padded to one length if they are shuffled.",
        )
    return True


def description_of_order(loader: Loader) -> str:
    """Return the order of the rows of a loader, in words."""
    return loader.order_description if isinstance(loader, (KeptRows, CheckedRows)) else READ_AGAIN


def _in_dataset_order(loader: Loader) -> Loader:
    """Return a DataLoader that reads its data set in order instead of shuffling; any other loader unchanged."""
    if type(loader) is not DataLoader:
        return loader
    batches = loader.batch_sampler if loader.batch_size is not None else loader.sampler
    if type(batches) is not BatchSampler or type(batches.sampler) is not RandomSampler:
        return loader
    sampler, size = batches.sampler, len(loader.dataset)  # type: ignore[arg-type]
    draws_all = not sampler.replacement and sampler.num_samples == size
    if not draws_all or sampler.data_source is not loader.dataset or (batches.drop_last and size % batches.batch_size):
        return loader
    in_order = BatchSampler(SequentialSampler(loader.dataset), batches.batch_size, drop_last=False)  # type: ignore[arg-type]
    same = {name: getattr(loader, name) for name in ("collate_fn", "num_workers", "worker_init_fn", "timeout")}
    if loader.batch_size is None:
        return DataLoader(loader.dataset, sampler=in_order, batch_size=None, **same)
    return DataLoader(loader.dataset, batch_sampler=in_order, **same)


def _by_digest(batches: Sequence[Query], digests: Digests) -> tuple[tuple[Query, ...], Digests, Positions] | None:
    """Return batches of rows sorted by digest, their digests and the inverse order; None if that is impossible."""
    whole = _joined(batches)
    if whole is None:
        return None
    columns, structure = whole
    order = sorted(range(len(digests)), key=digests.__getitem__)
    size = max(map(len, batches))
    grouped = []
    for start in range(0, len(order), size):
        index = torch.tensor(order[start : start + size])
        leaves = [leaf[index.to(leaf.device)] if by_row else leaf for leaf, by_row in columns]
        grouped.append(Query(*pytree.tree_unflatten(leaves, structure)))
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    return tuple(grouped), [digests[i] for i in order], back


def _joined(batches: Sequence[Query]) -> tuple[list[tuple[Any, bool]], pytree.TreeSpec] | None:
    """Return each leaf joined over all batches, and whether it has rows; None if batches differ in more than rows."""
    flattened = [pytree.tree_flatten((batch.x, batch.y)) for batch in batches]
    structures = [structure for _, structure in flattened]
    if any(structure != structures[0] for structure in structures):
        return None
    columns: list[tuple[Any, bool]] = []
    for leaves in zip(*(leaves for leaves, _ in flattened), strict=True):
        first = leaves[0]
        if _have_rows(leaves, batches):
            if len({(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves}) != 1:
                return None
            columns.append((torch.cat(leaves), True))
        elif all(_are_equal(leaf, first) for leaf in leaves):
            columns.append((first, False))
        else:
            return None
    return columns, structures[0]


def _have_rows(leaves: Sequence[Any], batches: Sequence[Query]) -> bool:
    """Return whether the first dimension of a tensor counts rows in every batch."""
    return all(
        isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.layout == torch.strided and len(leaf) == len(batch)
        for leaf, batch in zip(leaves, batches, strict=True)
    )


def _are_equal(leaf: object, other: object) -> bool:
    leaf, other = plain_inputs(leaf), plain_inputs(other)
    if not isinstance(leaf, Tensor) or not isinstance(other, Tensor):
        return type(leaf) is type(other) and repr(leaf) == repr(other)
    alike = leaf.shape == other.shape and leaf.dtype == other.dtype
    return alike and np.array_equal(bits_by_row(leaf.unsqueeze(0)), bits_by_row(other.unsqueeze(0)))


def _sorted_batches(batches: Sequence[Query]) -> tuple[tuple[Query, ...], Digests]:
    """Return the batches sorted by the digests of their rows."""
    pairs = sorted(((row_hashes(b.x, b.y), i) for i, b in enumerate(batches)))
    return tuple(batches[i] for _, i in pairs), [digest for found, _ in pairs for digest in found]


def _size(query: Query) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of((query.x, query.y)))
