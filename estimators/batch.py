"""One batch: inputs and targets of some rows, and how a loader's item becomes one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from estimators.errors import DataError
from estimators.pytrees import PyTree, n_rows, split_rows, tensors_of
from estimators.rng import preserved_random_state

__all__ = ["Batch", "Loader", "empty_loader", "first_batch", "size_in_bytes", "split_batch"]

Loader = Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of B rows."""

    x: PyTree
    y: Tensor

    def __len__(self) -> int:
        return n_rows(self.x)

    def parts(self, size: int | None) -> list[Batch]:
        """Consecutive parts of at most `size` rows; None: the batch itself."""
        if size is None or len(self) <= size:
            return [self]
        return [Batch(x, y) for x, y in split_rows((self.x, self.y), size)]


def split_batch(item: object) -> Batch:
    """(x, y), or a dict with "labels"."""
    if isinstance(item, dict) and isinstance(item.get("labels"), Tensor):
        return Batch({key: value for key, value in item.items() if key != "labels"}, item["labels"])
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Tensor):
        return Batch(item[0], item[1])
    raise DataError(
        'batches (x, y) with a tensor y, or dicts with a tensor "labels"',
        received=f"{type(item).__name__}"
        + (f" of length {len(item)}" if isinstance(item, (tuple, list, dict)) else ""),
        remedy="wrap the loader so that it yields pairs.",
    )


def first_batch(loader: Loader) -> Batch:
    """The first batch, the random state left as it was."""
    with preserved_random_state():
        for item in loader:
            return split_batch(item)
    raise empty_loader()


def empty_loader() -> DataError:
    """What is said of a loader without rows."""
    return DataError(
        "a loader that yields at least one row",
        received="an empty one",
        remedy="check the data set, drop_last and the sampler; pass a re-iterable loader, not an iterator.",
    )


def size_in_bytes(batch: Batch) -> int:
    """Of its tensors."""
    return sum(t.numel() * t.element_size() for t in [*tensors_of(batch.x), batch.y])
