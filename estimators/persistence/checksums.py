"""Digests of contents, and a checksum of a data set that does not depend on the order of its rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.numerics.pytrees import PyTree, Shared, n_rows, plain_inputs

__all__ = ["DatasetChecksum", "bits_by_row", "digest", "row_hashes"]


def digest(*parts: bytes | str | Tensor) -> bytes:
    """Return the SHA-256 of the concatenation of some parts.

    Args:
        parts: bytes, text (as UTF-8), or dense tensors of any strides (their values as bytes, without shape and dtype).

    Returns:
        32 bytes.
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(_bytes(part.detach().cpu().resolve_conj().resolve_neg().flatten()).data)
        else:
            sha.update(part.encode() if isinstance(part, str) else part)
    return sha.digest()


_ROUND_OFF = 1e-5
"""Relative difference of two sums over the same rows in another order, or on another device, that still agrees."""


@dataclass(frozen=True)
class DatasetChecksum:
    """Sums over one pass of the data in float64: outputs and targets, weighted by column, with their squares.

    Outputs of the network stand for the inputs: they are tensors, and the pass computes them anyway. Inputs may be any
    pytree. The sums depend neither on the order of rows nor on which target belongs to which row.

    Args:
        outputs: Σₙ Σ_j (j fₙⱼ + fₙⱼ²) over rows n and output columns j.
        outputs_size: the same sum of absolute values, the scale of round-off.
        targets: Σₙ Σ_j (j yₙⱼ + yₙⱼ²).
        targets_size: the same sum of absolute values.
    """

    outputs: float = 0.0
    outputs_size: float = 0.0
    targets: float = 0.0
    targets_size: float = 0.0

    def plus(self, f: Tensor, y: Tensor) -> DatasetChecksum:
        """Return the checksum with the rows of one more batch, outputs f and targets y, (B, ...)."""
        outputs, outputs_size = _weighted(f)
        targets, targets_size = _weighted(y)
        return DatasetChecksum(
            self.outputs + outputs,
            self.outputs_size + outputs_size,
            self.targets + targets,
            self.targets_size + targets_size,
        )

    def agrees(self, other: DatasetChecksum) -> bool:
        """Return whether both have the same sums, up to the round-off of another order or device."""
        outputs = abs(self.outputs - other.outputs) <= _ROUND_OFF * self.outputs_size
        return outputs and abs(self.targets - other.targets) <= _ROUND_OFF * self.targets_size


def _weighted(values: Tensor) -> tuple[float, float]:
    """Return Σ j·v_j + v_j² over the columns j, and the sum of the absolute values of these terms."""
    values = values.detach().double().flatten(1) if values.ndim > 1 else values.detach().double()[:, None]
    weights = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=torch.float64)
    squares = values.square().sum()
    return float((values * weights).sum() + squares), float((values.abs() * weights).sum() + squares)


def row_hashes(x: PyTree, y: Tensor | None = None) -> list[bytes]:
    """Return a digest for each row of a batch, which does not depend on the other rows.

    A tensor with as many rows as the batch contributes one row to each digest. Other tensors, tensors marked as shared
    (they do not have one entry per row, such as an adjacency matrix), and plain values contribute to all digests.

    Args:
        x: inputs of B rows, a tensor or a pytree of tensors; shared ones may be marked (`RowLayout.mark`).
        y: targets of the same rows, (B, ...), or None.

    Returns:
        B digests of 32 bytes.
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
    rows = zip(*columns, strict=True) if columns else ()
    return [digest(*(len(part).to_bytes(8, "little") + part for part in parts)) for parts in rows]


def bits_by_row(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of each row of a tensor of any layout and dtype."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return _bytes(dense.flatten(1) if dense.ndim > 1 else dense.unsqueeze(1))


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a dense tensor, whose last dimension becomes longer by the bytes of a number.

    A dimension of size 1 may have any stride in a contiguous tensor, such as one row of a column of a table. Viewed as
    bytes it needs the stride 1.
    """
    dense = tensor.contiguous()
    if dense.stride(-1) != 1:
        dense = dense.clone(memory_format=torch.contiguous_format)
    raw: NDArray[np.uint8] = dense.view(torch.uint8).numpy()
    return raw
