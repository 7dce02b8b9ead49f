"""Rows of numbers that are kept for long: as they are, or in half the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["HALVES", "StoredRows"]

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredRows:
    """values (r, P) of some dtype, each row times its size (r,), of the dtype that they are read in.

    In float16 a row is divided by its largest entry first, or the small ones of a long unit vector would vanish.
    """

    values: Tensor
    sizes: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype | None) -> Self:
        """Keep rows (r, P) in `dtype`; None: as they are, not copied."""
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
        """(r, P), to compute with."""
        return self.values if self.sizes is None else self.values.to(self.sizes.dtype) * self.sizes[:, None]

    def state(self) -> dict[str, Tensor]:
        """Tensors by the names of `restored`."""
        return {"basis": self.values} | ({} if self.sizes is None else {"sizes": self.sizes})
