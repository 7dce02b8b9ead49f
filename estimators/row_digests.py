"""Digests of rows by their bits: which rows two data sets share, and what a data set is, in whatever order."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.pytrees import PyTree, n_rows, tensors_of

__all__ = ["bits", "row_digests"]


def row_digests(rows: PyTree, n: int | None = None) -> list[bytes]:
    """A digest of 32 bytes for each row of a pytree, over its tensors and over all that the rows share.

    Args:
        rows: inputs, or inputs and targets.
        n: the number of rows; None: that of the first tensor with rows. Other tensors are shared by the rows.
    """
    n = n_rows(rows) if n is None else n
    tables, shared = list[NDArray[np.uint8]](), b""
    for leaf in pytree.tree_leaves(rows):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n:
            tables.append(bits(leaf.reshape(n, -1)))
        else:
            tensors = tensors_of(leaf)
            shared += bits(tensors[0].reshape(1, -1)).tobytes() if tensors else repr(leaf).encode()
    return [hashlib.sha256(b"".join([*(table[i].tobytes() for table in tables), shared])).digest() for i in range(n)]


def bits(table: Tensor) -> NDArray[np.uint8]:
    """The bytes of a table (n, m), row by row."""
    raw: NDArray[np.uint8] = table.detach().cpu().contiguous().view(torch.uint8).numpy()
    return raw
