"""Rows that are stored for the lifetime of an estimator, optionally in half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["HALVES", "StoredRows"]

HALVES = (torch.float16, torch.bfloat16)
"""The half-precision dtypes in which rows may be stored."""


@dataclass(frozen=True)
class StoredRows:
    """Rows (r, P), each stored as values times a size.

    In float16 each row is divided by its largest entry first: small entries of a long unit vector would underflow.

    Attributes:
        values: (r, P), in the dtype of the storage.
        sizes: (r,), in the dtype of the computation; None for 1.
    """

    values: Tensor
    sizes: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype | None) -> Self:
        """Store rows (r, P) in `dtype`; None stores them as they are, without a copy."""
        if dtype is None:
            return cls(rows)
        values = torch.empty_like(rows, dtype=dtype)
        sizes = rows.new_ones(len(rows))
        for i, row in enumerate(rows):  # one at a time: rows may fill the memory
            sizes[i] = row.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)
            values[i] = row / sizes[i]
        return cls(values, sizes)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def rows(self) -> Tensor:
        """The rows (r, P) in the dtype of the computation."""
        return self.values if self.sizes is None else self.values.to(self.sizes.dtype) * self.sizes[:, None]

    def state(self) -> dict[str, Tensor]:
        """The tensors by their names in a file."""
        return {"basis": self.values} | ({} if self.sizes is None else {"sizes": self.sizes})
