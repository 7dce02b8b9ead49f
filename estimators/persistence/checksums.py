"""Sums that tell one data set from another, whatever the order of its rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.numerics.pytrees import PyTree, n_rows, tensors_of

__all__ = ["DatasetChecksum", "bits", "row_hashes"]


@dataclass(frozen=True)
class DatasetChecksum:
    """Of a pass over the data, in double precision: outputs and targets weighted by column, and their sizes."""

    outputs: float = 0.0
    outputs_size: float = 0.0
    targets: float = 0.0
    targets_size: float = 0.0

    def plus(self, f: Tensor, y: Tensor) -> DatasetChecksum:
        """With the rows of one more batch."""
        outputs, outputs_size = _weighted(f)
        targets, targets_size = _weighted(y)
        return DatasetChecksum(
            self.outputs + outputs,
            self.outputs_size + outputs_size,
            self.targets + targets,
            self.targets_size + targets_size,
        )

    def agrees(self, other: DatasetChecksum) -> bool:
        """Whether both are of the same rows, up to the round-off of another order or device."""
        outputs = abs(self.outputs - other.outputs) <= 1e-5 * self.outputs_size
        return outputs and abs(self.targets - other.targets) <= 1e-5 * self.targets_size


def _weighted(values: Tensor) -> tuple[float, float]:
    """Σ j·v_j + v_j² over the columns j, and the same of absolute values."""
    values = values.detach().double().flatten(1) if values.ndim > 1 else values.detach().double()[:, None]
    weights = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=torch.float64)
    squares = values.square().sum()
    return float((values * weights).sum() + squares), float((values.abs() * weights).sum() + squares)


def row_hashes(rows: PyTree, n: int | None = None) -> list[bytes]:
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
