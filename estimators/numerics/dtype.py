"""The dtype of dense algebra."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WELL_CONDITIONED", "algebra_dtype", "to_algebra_dtype"]

WELL_CONDITIONED = 1e6
"""Condition number up to which float32 queries are computed in float32: the measured error is at most 8e-7."""


def algebra_dtype(device: torch.device) -> torch.dtype:
    """Return float64 if the device has it, for any dtype of the network.

    A posterior variance is often a small remainder of the prior's: with A conditioned like 10⁶, float32 keeps no digit
    of it in function space (seen: negative variances). Outputs and Jacobians stay in the network's dtype.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def to_algebra_dtype(tensor: Tensor) -> Tensor:
    """Return the tensor in `algebra_dtype`, in which small matrices are formed, summed and factored.

    Outputs are converted before Λ is formed, and features before their second moment. In float32 the difference 1 − p
    of a confident row, and the small eigenvalues of a sum of large squares, lose all digits.
    """
    return tensor.to(algebra_dtype(tensor.device))
