"""What torch raises if a network does not allow a derivative or a call, and what no other attempt can mend."""

from __future__ import annotations

import torch

from estimators.errors import EstimatorError

__all__ = ["FAILURES", "is_final_error", "short"]

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError)
"""What torch, or the network itself, raises. `is_final_error` tells which of these to raise further."""


def is_final_error(error: BaseException) -> bool:
    """Whether no other attempt can help: an error of this library, or one about memory."""
    return isinstance(error, (EstimatorError, torch.OutOfMemoryError))


def short(error: BaseException) -> str:
    """The first sentence of an error of torch."""
    return str(error).strip().split("\n")[0].split(". ")[0][:160] or type(error).__name__
