"""The arrays of a record by part: of the untuned or tuned estimator, and of one set of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import tuned as without_tuned_prefix

__all__ = ["ArrayView"]

_TUNED = "tuned/"
_SCORED = ("", "validation", "ood", "shift", "decision")
Orders = Mapping[str, NDArray[np.int64]]
"""For each set of rows ("" is the test rows): indices that put its rows into another order."""


class ArrayView(Mapping[str, NDArray[Any]]):
    """Some arrays of an .npz file, by name. Each is read at its first use and cached."""

    def __init__(
        self,
        path: Path,
        names: Mapping[str, str],
        cache: dict[str, NDArray[Any]] | None = None,
        orders: Orders | None = None,
    ) -> None:
        self._path, self._names, self._orders = path, dict(names), orders or {}
        self._cache: dict[str, NDArray[Any]] = {} if cache is None else cache

    @classmethod
    def open(cls, path: Path, *, read: bool = False, orders: Orders | None = None) -> ArrayView:
        """Return a view of every array of a file.

        `read` reads all of them now, which is faster if all are needed. `orders` reorders the rows of sets.
        """
        with np.load(path, allow_pickle=False) as file:
            names = {name: name for name in file.files}
            view = cls(path, names, orders=orders)
            if read:
                view._cache |= {name: view._in_order(name, array) for name, array in file.items()}
            return view

    def untuned(self) -> ArrayView:
        """Return the arrays of the untuned estimator."""
        return self._view({n: s for n, s in self._names.items() if not n.startswith(_TUNED)})

    def tuned(self) -> ArrayView | None:
        """Return the arrays of the tuned estimator, with the names of `untuned`; None if there are none."""
        found = without_tuned_prefix(self._names)
        return self._view(found) if found else None

    def for_metrics(self) -> ArrayView:
        """Return the sets of rows that have metrics; the rows of a plot grid, for instance, have none."""
        family = {name: name.rpartition("/")[0].partition("/")[0] for name in self._names}  # "ood/letters/mean" → "ood"
        return self._view({n: s for n, s in self._names.items() if family[n] in _SCORED})

    def subset(self, prefix: str) -> ArrayView:
        """Return the arrays of one set of rows, such as `ood/letters`, without the prefix."""
        start = f"{prefix}/"
        return self._view({n.removeprefix(start): s for n, s in self._names.items() if n.startswith(start)})

    def sets(self, family: str) -> list[str]:
        """Return the names of the sets of a family, "ood" or "shift"."""
        start = f"{family}/"
        return list(dict.fromkeys(n.removeprefix(start).rpartition("/")[0] for n in self if n.startswith(start)))

    def __getitem__(self, name: str) -> NDArray[Any]:
        stored = self._names[name]
        if stored not in self._cache:
            with np.load(self._path, allow_pickle=False) as file:
                self._cache[stored] = self._in_order(stored, file[stored])
        return self._cache[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _view(self, names: Mapping[str, str]) -> ArrayView:
        return ArrayView(self._path, names, self._cache, self._orders)

    def _in_order(self, stored: str, array: NDArray[Any]) -> NDArray[Any]:
        order = self._orders.get(stored.removeprefix(_TUNED).rpartition("/")[0])
        return array if order is None else array[order]
