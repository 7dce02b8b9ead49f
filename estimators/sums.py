"""Sums that tell one data set from another, whatever the order of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sums"]


@dataclass(frozen=True)
class Sums:
    """Of a pass over the data, in double precision: outputs and targets weighted by column, and their sizes."""

    outputs: float = 0.0
    outputs_size: float = 0.0
    targets: float = 0.0
    targets_size: float = 0.0

    def plus(self, f: Tensor, y: Tensor) -> Sums:
        """With the rows of one more batch."""
        outputs, outputs_size = _weighted(f)
        targets, targets_size = _weighted(y)
        return Sums(
            self.outputs + outputs,
            self.outputs_size + outputs_size,
            self.targets + targets,
            self.targets_size + targets_size,
        )

    def agrees(self, other: Sums) -> bool:
        """Whether both are of the same rows, up to the round-off of another order or device."""
        outputs = abs(self.outputs - other.outputs) <= 1e-5 * self.outputs_size
        return outputs and abs(self.targets - other.targets) <= 1e-5 * self.targets_size


def _weighted(values: Tensor) -> tuple[float, float]:
    """Σ j·v_j + v_j² over the columns j, and the same of absolute values."""
    values = values.detach().double().flatten(1) if values.ndim > 1 else values.detach().double()[:, None]
    weights = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=torch.float64)
    squares = values.square().sum()
    return float((values * weights).sum() + squares), float((values.abs() * weights).sum() + squares)
