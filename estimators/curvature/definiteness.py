"""The smallest eigenvalue, relative to the largest, at which a posterior precision counts as positive definite."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.errors import IndefiniteHessianError

__all__ = ["check_eigenvalues", "smallest_allowed_ratio"]


def smallest_allowed_ratio(dtype: torch.dtype) -> float:
    """The smallest over the largest eigenvalue of an invertible matrix: 5e-10 in float64, 2e-6 in float32."""
    return 5e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps


def check_eigenvalues(*eigenvalues: Tensor) -> None:
    """Check that the smallest of all eigenvalues is not too small a part of the largest.

    Raises:
        IndefiniteHessianError: it is.
    """
    smallest = min(float(part.min()) for part in eigenvalues if part.numel())
    largest = max(float(part.max()) for part in eigenvalues if part.numel())
    if smallest <= smallest_allowed_ratio(eigenvalues[0].dtype) * largest:
        raise IndefiniteHessianError(smallest=smallest, largest=largest)
