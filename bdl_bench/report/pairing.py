"""Matching of the rows of two records by the row identities that are stored with predictions.

Records of version 0.1 have no identities; theirs are matched by position, if their targets are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.problem.row_identity import matching_order

__all__ = ["Rows", "order_of_test_rows", "orders_between", "rows_of", "why_not_comparable"]

Rows = Mapping[str, NDArray[Any]]
"""The arrays "row_id" and "targets" of the test rows, and "validation/row_id", "ood/gap/row_id", … of other sets."""

_ID, _TARGETS = "row_id", "targets"
_MATCHED = ("", "validation", "ood", "shift")
"""First parts of the names of the sets whose rows are matched; the test set has no name."""


def rows_of(path: Path) -> Rows:
    """Return the identities and targets of the rows in a file of arrays."""
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if _identifies_rows(name)]
        return {name: file[name] for name in names}


def why_not_comparable(rows: Rows, reference: Rows) -> str | None:
    """Return why two records are not of the same rows; None if they are.

    Records of version 0.1 have no identities. Two of these are of the same rows if the targets of every set that both
    store are equal, row by row.
    """
    for name in _sets(rows, reference):
        reason = _difference(name, rows, reference)
        if reason is not None:
            return f"{reason} in its {name or 'test'} rows"
    return None


def orders_between(rows: Rows, reference: Rows) -> dict[str, NDArray[np.int64]]:
    """Return, for each set whose order differs, the indices that put the rows into the order of the reference."""
    orders: dict[str, NDArray[np.int64]] = {}
    for name in _sets(rows, reference):
        mine, theirs = rows.get(_name(name, _ID)), reference.get(_name(name, _ID))
        if mine is None or theirs is None or np.array_equal(mine, theirs):
            continue
        order = matching_order(mine, theirs)
        assert order is not None
        orders[name] = order
    return orders


def order_of_test_rows(rows: Rows, reference: Rows) -> NDArray[np.int64] | None:
    """Return the indices that put the test rows of a seed into the order of those of another seed; None if they differ.

    Records of version 0.1 have no identities. Their test rows are the same if their targets are equal.
    """
    mine, theirs = rows.get(_ID), reference.get(_ID)
    if mine is not None and theirs is not None:
        return matching_order(mine, theirs)
    targets, others = rows.get(_TARGETS), reference.get(_TARGETS)
    if mine is None and theirs is None and targets is not None and others is not None:
        return np.arange(len(targets)) if np.array_equal(targets, others, equal_nan=True) else None
    return None


def _difference(name: str, rows: Rows, reference: Rows) -> str | None:
    mine, theirs = (found.get(_name(name, _ID)) for found in (rows, reference))
    if mine is not None and theirs is not None:
        if matching_order(mine, theirs) is not None:
            return None
        other = len(mine) - int(np.isin(mine, theirs).sum())
        return f"{other} of {len(mine)} rows have no counterpart among {len(theirs)}"
    if (mine is None) != (theirs is None):
        return "only one of both records has row identities"
    targets = [found.get(_name(name, _TARGETS)) for found in (rows, reference)]
    if targets[0] is None or targets[1] is None or np.array_equal(targets[0], targets[1], equal_nan=True):
        return None
    return "different targets, without row identities,"


def _sets(rows: Rows, reference: Rows) -> list[str]:
    """Return the sets that both records have."""
    mine, theirs = ({name.rpartition("/")[0] for name in found} for found in (rows, reference))
    return sorted(mine & theirs)


def _identifies_rows(name: str) -> bool:
    group, _, field = name.rpartition("/")
    return field in (_ID, _TARGETS) and group.partition("/")[0] in _MATCHED


def _name(name: str, field: str) -> str:
    return f"{name}/{field}" if name else field
