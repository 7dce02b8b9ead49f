"""Digests of rows by their bits: which rows two data sets share, and what a data set is, in whatever order."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from estimators.pytrees import PyTree, n_rows, row_tensors

__all__ = ["bits", "row_digests"]


def row_digests(rows: PyTree) -> list[bytes]:
    """A digest of 32 bytes for each row of a pytree, over all of its tensors with as many rows; others are left out."""
    n = n_rows(rows)
    tables = [bits(t.reshape(n, -1)) for t in row_tensors(rows) if len(t) == n]
    return [hashlib.sha256(b"".join(table[i].tobytes() for table in tables)).digest() for i in range(n)]


def bits(table: Tensor) -> NDArray[np.uint8]:
    """The bytes of a table (n, m), row by row."""
    raw: NDArray[np.uint8] = table.detach().cpu().contiguous().view(torch.uint8).numpy()
    return raw
