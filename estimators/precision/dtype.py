"""The dtype of dense algebra."""

from __future__ import annotations

import torch

__all__ = ["algebra_dtype"]


def algebra_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it, whatever the network's dtype.

    A posterior variance is often a small remainder of the prior's: with A conditioned like 10⁶, float32 keeps no digit
    of it in function space (seen: negative variances). Outputs and Jacobians stay in the network's dtype.
    """
    return torch.float32 if device.type == "mps" else torch.float64
