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
    """Rows (r, P), such as basis vectors of a Krylov space, each stored as values times a scale.

    In half precision each row is divided by its largest entry first: small entries of a long unit vector would
    underflow in float16.

    Attributes:
        values: (r, P), in the dtype of the storage.
        scales: (r,), in the dtype of the computation; None for 1.
    """

    values: Tensor
    scales: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype | None) -> Self:
        """Store rows (r, P) in `dtype`; None stores them as they are, without a copy."""
        if dtype is None:
            return cls(rows)
        values = torch.empty_like(rows, dtype=dtype)
        scales = rows.new_ones(len(rows))
        for i, row in enumerate(rows):  # one at a time: rows may fill the memory
            scales[i] = row.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)
            values[i] = row / scales[i]
        return cls(values, scales)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def rows(self) -> Tensor:
        """The rows (r, P) in the dtype of the computation."""
        return self.values if self.scales is None else self.values.to(self.scales.dtype) * self.scales[:, None]

    def state(self) -> dict[str, Tensor]:
        """The tensors by their names in a file; the rows are the basis of a Krylov space there."""
        return {"basis": self.values} | ({} if self.scales is None else {"scales": self.scales})
