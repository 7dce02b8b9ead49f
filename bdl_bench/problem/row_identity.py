"""The identity of a row: a digest of its inputs and its target, the same in every pass and in every process."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.numerics.pytrees import PyTree, Shared, n_rows, plain_inputs
from estimators.persistence.checksums import digest

__all__ = ["Digests", "Ids", "bits_by_row", "digests_of_rows", "ids_of", "matching_order", "position_ids"]

Digests = list[bytes]
Ids = NDArray[np.uint64]

_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))
"""The odd factors of the SplitMix64 generator, modulo 2⁶⁴, which separate neighbouring numbers."""


def digests_of_rows(x: PyTree, y: Tensor | None) -> Digests:
    """Return a digest of 32 bytes for each row of a batch.

    A tensor with as many rows as the batch contributes one row to each digest. Other tensors, tensors marked as shared,
    and plain values contribute to all digests. So the digest of a row does not depend on the other rows.
    """
    n = n_rows(x) if y is None or not y.ndim else len(y)
    columns: list[list[bytes]] = []
    for leaf in pytree.tree_leaves((x, y)):
        if isinstance(leaf, (Tensor, Shared)):
            tensor: Tensor = plain_inputs(leaf)
            has_rows = tensor is leaf and tensor.ndim > 0 and len(tensor) == n
            table = bits_by_row(tensor if has_rows else tensor.unsqueeze(0))
            columns.append([row.tobytes() for row in table] * (1 if has_rows else n))
        elif isinstance(leaf, (str, bytes, bool, int, float, complex)):
            columns.append([repr(leaf).encode()] * n)
    return [_digest(parts) for parts in zip(*columns, strict=True)] if columns else []


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


def bits_by_row(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of each row of a tensor of any layout and dtype."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    table = (dense.flatten(1) if dense.ndim > 1 else dense.unsqueeze(1)).contiguous()
    raw: NDArray[np.uint8] = table.view(torch.uint8).numpy()
    return raw


def _digest(parts: tuple[bytes, ...]) -> bytes:
    return digest(*(len(part).to_bytes(8, "little") + part for part in parts))
