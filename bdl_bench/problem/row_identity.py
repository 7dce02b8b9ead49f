"""The identity of a row: a digest of its inputs and its target, the same in every pass and in every process.

`estimators.persistence.checksums.row_hashes` computes the digests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Digests", "Ids", "ids_of", "matching_order", "position_ids"]

Digests = list[bytes]
Ids = NDArray[np.uint64]

_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))
"""The odd factors of the SplitMix64 generator, modulo 2⁶⁴, which separate neighbouring numbers."""


def ids_of(digests: Digests) -> Ids:
    """Return the first eight bytes of each digest as a number, which is stored with the predictions of the row."""
    return np.frombuffer(b"".join(digest[:8] for digest in digests), dtype="<u8").astype(np.uint64)


def position_ids(rows: Ids, row_of: NDArray[np.int64]) -> Ids:
    """Return an identity for each position (token, pixel): that of its row, mixed with the index within the row.

    `row_of` (M,) has the index of the row of each position; the positions of a row follow each other.
    """
    starts = np.searchsorted(row_of, np.arange(len(rows)))
    within = (np.arange(len(row_of)) - starts[row_of]).astype(np.uint64)
    mixed: Ids = (rows[row_of] + np.uint64(1)) * _ODD[0] ^ within * _ODD[1]
    return mixed


def matching_order(ids: Ids, wanted: Ids) -> NDArray[np.int64] | None:
    """Return the indices that put rows with these identities into the wanted order; None if the rows are not the same.

    Rows with equal identities are the same row more than once, so any order among them is right.
    """
    if len(ids) != len(wanted):
        return None
    mine, theirs = np.argsort(ids, kind="stable"), np.argsort(wanted, kind="stable")
    if not np.array_equal(ids[mine], wanted[theirs]):
        return None
    order = np.empty(len(ids), dtype=np.int64)
    order[theirs] = mine
    return order
