"""The ends of the spectrum of an A known by its products; an A that is not positive definite is refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from estimators.curvature.dense.cholesky import smallest_allowed_ratio
from estimators.curvature.krylov.block_lanczos import Product, krylov_basis
from estimators.errors import IndefiniteHessianError
from estimators.objective.float64 import to_float64
from estimators.objective.objective import Objective

__all__ = ["extreme_eigenvalues", "positive_definite", "refuse_indefinite_product"]

_COLUMNS, _SIZE = 4, 400


def refuse_indefinite_product(product: Product, like: Tensor) -> None:
    """Lanczos from random vectors, for θ (P,) `like`: the whole spectrum below 400 parameters, its ends beyond.

    Solves alone cannot show it: a direction that leaves the outputs alone (query and key of attention turned together)
    is orthogonal to every right-hand side J, and singular all the same.
    Errors: IndefiniteHessianError where the smallest Ritz value is too small a part of the largest.
    """
    smallest, largest = extreme_eigenvalues(product, like)
    if smallest <= smallest_allowed_ratio(like.dtype) * largest:
        raise IndefiniteHessianError(smallest=smallest, largest=largest)


def positive_definite(objective: Objective, product_of: Callable[[Objective], Product]) -> Objective:
    """Returns an objective whose A is positive definite: this one, or in float64, if float32 cannot show it.

    Errors: IndefiniteHessianError where A is not.
    """
    try:
        refuse_indefinite_product(product_of(objective), objective.theta)
    except IndefiniteHessianError:
        wide = to_float64(objective)
        if wide is objective:
            raise
        refuse_indefinite_product(product_of(wide), wide.theta)
        return wide
    return objective


def extreme_eigenvalues(
    product: Product, like: Tensor, *, columns: int = _COLUMNS, size: int = _SIZE
) -> tuple[float, float]:
    """The smallest and the largest Ritz value of a Krylov space of `size` vectors, for θ (P,) `like`.

    All of them lie within the spectrum: the smallest eigenvalue is at most, the largest at least what is returned; both
    are exact where `size` reaches P.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    start = torch.randn(columns, like.numel(), generator=generator, dtype=like.dtype, device=like.device)
    _, projected = krylov_basis(product, start, size=min(size, like.numel()))
    ritz = torch.linalg.eigvalsh(projected)
    return float(ritz[0]), float(ritz[-1])
