"""Refuse an exact Hessian that is not positive definite: the limit λ → 0 does not exist there."""

from __future__ import annotations

import torch

from estimators.errors import IndefiniteHessianError
from estimators.objective import Objective
from estimators.precision.block_cg import krylov_basis
from estimators.precision.dense import smallest_allowed_ratio

__all__ = ["refuse_indefinite"]

_COLUMNS, _SIZE = 4, 400


def refuse_indefinite(objective: Objective) -> None:
    """Lanczos from random vectors: the whole spectrum below 400 parameters, its ends beyond.

    A right-hand side J cannot show it: directions that leave the outputs alone (query and key of attention turned
    together) are orthogonal to every J, and singular all the same.
    Errors: IndefiniteHessianError where the smallest Ritz value is too small a part of the largest.
    """
    theta = objective.theta
    generator = torch.Generator(theta.device).manual_seed(0)
    start = torch.randn(_COLUMNS, theta.numel(), generator=generator, dtype=theta.dtype, device=theta.device)
    _, projected = krylov_basis(objective.product, start, size=min(_SIZE, theta.numel()))
    ritz = torch.linalg.eigvalsh(projected)
    smallest, largest = float(ritz[0]), float(ritz[-1])
    if smallest <= smallest_allowed_ratio(theta.dtype) * largest:
        raise IndefiniteHessianError(smallest=smallest, largest=largest)
