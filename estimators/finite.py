"""Whether all of a tensor's entries are numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_finite"]


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no Inf: either would be in the sum, whose size alone decides where it overflows.

    A pass that reads, where `isfinite` writes a table of the tensor's size and reads it again.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
