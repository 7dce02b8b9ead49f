"""One batch: inputs and targets of some rows, and how a loader's item becomes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from estimators.data.inputs import as_inputs
from estimators.errors import DataError
from estimators.numerics.pytrees import PyTree, RowLayout, copied, split_rows, tensors_of
from estimators.runtime.rng import preserved_random_state

__all__ = [
    "Batch",
    "Loader",
    "PairLoader",
    "check_iterable",
    "empty_loader",
    "first_batch",
    "is_mapping",
    "size_in_bytes",
    "split_batch",
]

Loader = Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of B rows.

    Args:
        x: inputs, a tensor (B, ...) or a pytree of tensors; what all rows share may have another shape.
        y: targets (B, ...).
    """

    x: PyTree
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def copy(self) -> Batch:
        """Return the batch with copies of its tensors."""
        return Batch(copied(self.x), self.y.clone())

    def mark_shared(self, layout: RowLayout) -> Batch:
        """Mark the input tensors that all rows of the batch share.

        Args:
            layout: which input tensors have rows.

        Returns:
            The batch with the shared tensors wrapped in `Shared`.
        """
        return Batch(layout.mark(self.x, len(self)), self.y)

    def parts(self, size: int | None) -> list[Batch]:
        """Split the batch into consecutive parts.

        Args:
            size: the largest number of rows per part; None keeps the batch whole.

        Returns:
            The parts, in order.
        """
        if size is None or len(self) <= size:
            return [self]
        return [Batch(x, y) for x, y in split_rows((self.x, self.y), size)]


@dataclass(frozen=True)
class PairLoader:
    """Batches as a re-iterable loader of (x, y), for code that reads a user's loader."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[tuple[PyTree, Tensor]]:
        return ((batch.x, batch.y) for batch in self.batches)


def split_batch(item: object) -> Batch:
    """Return the batch in an item of a loader: (x, y), or a mapping or dataclass with "labels" (or "label").

    Raises:
        DataError: another item, targets that are no tensor with rows, or inputs whose rows cannot be taken.
    """
    if isinstance(item, Batch):
        return item
    if is_mapping(item):
        return _of_mapping(item, as_inputs(item))
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return Batch(as_inputs(item[0]), _checked_targets(item, item[1]))
    if isinstance(item, (tuple, list)) and len(item) > 2:
        raise _no_batch(
            item,
            'yield a dict with the arguments of forward by name, {"x": x, "mask": mask, "labels": y}, or pairs '
            "((x, mask), y), whose tuple is the one argument of forward.",
        )
    raise _no_batch(item, "wrap the loader so that it yields pairs.")


def is_mapping(item: object) -> bool:
    """Return whether the entries of a batch or query are passed by name."""
    return isinstance(item, Mapping) or (is_dataclass(item) and not isinstance(item, (type, Batch)))


def _of_mapping(item: object, entries: dict[str, Any]) -> Batch:
    """Return the batch of a mapping, with targets under "labels" or, as in the `datasets` library, "label"."""
    names = [name for name in ("labels", "label") if entries.get(name) is not None]
    if not names:
        raise _no_batch(item, 'name the targets "labels", or wrap the loader so that it yields pairs.')
    if len(names) > 1:
        raise _no_batch(item, 'remove "label" or "labels", for instance by data.remove_columns("label"), or use pairs.')
    y = _checked_targets(item, entries[names[0]])
    return Batch({name: value for name, value in entries.items() if name not in ("labels", "label")}, y)


def _checked_targets(item: object, y: object) -> Tensor:
    if not isinstance(y, Tensor):
        raise _no_batch(item, "wrap the loader so that it yields pairs.", f" with targets of type {type(y).__name__}")
    if y.is_nested or y.layout != torch.strided:
        kind = "a nested tensor" if y.is_nested else f"of layout {y.layout}"
        raise _no_batch(item, "yield pairs with dense targets: y.to_dense(), or padded.", f" with targets {kind}")
    if not y.ndim:
        raise _no_batch(item, "yield pairs with one target per row: y.reshape(len(x)).", " with a target of shape ()")
    return y


def _no_batch(item: object, remedy: str, detail: str = "") -> DataError:
    length = f" of length {len(item)}" if isinstance(item, (tuple, list, Mapping)) else ""
    entries = f" with the entries {sorted(map(str, item))}" if isinstance(item, Mapping) else ""
    return DataError(
        'batches (x, y) with a tensor y, or dicts with a tensor "labels"',
        received=f"{type(item).__name__}{length}{entries}{detail}",
        remedy=remedy,
    )


def first_batch(loader: Loader) -> Batch:
    """Return the first batch; the random state is restored."""
    check_iterable(loader)
    with preserved_random_state():
        for item in loader:
            return split_batch(item)
    raise empty_loader()


def check_iterable(loader: object) -> None:
    """Raise DataError for a loader that cannot be iterated at all."""
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise DataError(
            'a loader of batches (x, y), or of dicts with "labels"',
            received=type(loader).__name__,
            remedy="pass a DataLoader or a list of batches.",
        )


def empty_loader() -> DataError:
    """Return the error for a loader without rows."""
    return DataError(
        "a loader that yields at least one row",
        received="an empty one",
        remedy="check the data set, drop_last and the sampler; pass a re-iterable loader, not an iterator.",
    )


def size_in_bytes(batch: Batch) -> int:
    """Return the bytes of the tensors of a batch."""
    return sum(t.numel() * t.element_size() for t in [*tensors_of(batch.x), batch.y])
