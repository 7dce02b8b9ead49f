"""The arrays of a record by part: as fitted, tuned, and under the name of a set of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayView"]

_TUNED = "tuned/"
_OF_METRICS = ("validation", "ood", "shift")
_SHARED = ("targets", "x", "row_id")
"""What tuning cannot change, and so need not be written twice."""
Orders = Mapping[str, NDArray[np.int64]]
"""By set of rows ("" for the test rows): the indices that put them into another order."""


class ArrayView(Mapping[str, NDArray[Any]]):
    """Arrays of an .npz file under names of their own, each read when first asked for and then kept."""

    def __init__(
        self,
        path: Path,
        names: Mapping[str, str],
        kept: dict[str, NDArray[Any]] | None = None,
        orders: Orders | None = None,
    ) -> None:
        self._path, self._names, self._orders = path, dict(names), orders or {}
        self._kept: dict[str, NDArray[Any]] = {} if kept is None else kept

    @classmethod
    def of(cls, path: Path, *, read: bool = False, orders: Orders | None = None) -> ArrayView:
        """Every array of a file; `read` reads all of them now, which is faster where all are needed.

        `orders` puts the rows of sets into another order.
        """
        with np.load(path, allow_pickle=False) as file:
            names = {name: name for name in file.files}
            view = cls(path, names, orders=orders)
            if read:
                view._kept |= {name: view._in_order(name, array) for name, array in file.items()}
            return view

    def fitted(self) -> ArrayView:
        """Without what the tuned estimator predicted."""
        return self._view({n: s for n, s in self._names.items() if not n.startswith(_TUNED)})

    def tuned(self) -> ArrayView | None:
        """What the tuned estimator predicted, under the same names as `fitted`; None where nothing was tuned."""
        found = {n.removeprefix(_TUNED): s for n, s in self._names.items() if n.startswith(_TUNED)}
        if not found:
            return None
        shared = {n: s for n, s in self.fitted()._names.items() if n.rpartition("/")[2] in _SHARED}
        return self._view(shared | found)

    def scored(self) -> ArrayView:
        """The parts that metrics are made for; a band over one input, for instance, is not one of them."""
        return self._view({n: s for n, s in self._names.items() if "/" not in n or n.partition("/")[0] in _OF_METRICS})

    def rows(self) -> ArrayView:
        """The test and validation rows alone: enough for a score of each test row."""
        return self._view({n: s for n, s in self._names.items() if "/" not in n or n.startswith("validation/")})

    def under(self, prefix: str) -> ArrayView:
        """The arrays of one set of rows, for instance `ood/letters`."""
        start = f"{prefix}/"
        return self._view({n.removeprefix(start): s for n, s in self._names.items() if n.startswith(start)})

    def sets(self, family: str) -> list[str]:
        """The names of the sets of a family ("ood", "shift")."""
        start = f"{family}/"
        return list(dict.fromkeys(n.removeprefix(start).rpartition("/")[0] for n in self if n.startswith(start)))

    def __getitem__(self, name: str) -> NDArray[Any]:
        stored = self._names[name]
        if stored not in self._kept:
            with np.load(self._path, allow_pickle=False) as file:
                self._kept[stored] = self._in_order(stored, file[stored])
        return self._kept[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _view(self, names: Mapping[str, str]) -> ArrayView:
        return ArrayView(self._path, names, self._kept, self._orders)

    def _in_order(self, stored: str, array: NDArray[Any]) -> NDArray[Any]:
        order = self._orders.get(stored.removeprefix(_TUNED).rpartition("/")[0])
        return array if order is None else array[order]
