"""The extreme eigenvalues of an A that is known by its products, and checks that A is positive definite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from estimators.curvature.definiteness import smallest_allowed_ratio
from estimators.curvature.krylov.block_lanczos import Product, krylov_basis
from estimators.errors import IndefiniteHessianError
from estimators.objective.float64 import to_float64
from estimators.objective.objective import Objective

__all__ = ["check_positive_definite", "extreme_eigenvalues", "with_definite_products"]

_COLUMNS = 4
"""Random start vectors: the size of a block of the Krylov space."""
_SIZE = 400
"""Vectors of the Krylov space. Up to 400 parameters this is the whole space, and Ritz values are the eigenvalues."""


def check_positive_definite(product: Product, like: Tensor) -> None:
    """Check by Lanczos from random vectors that A is positive definite, for θ (P,) `like`.

    Solves alone cannot show it. A direction that does not change the outputs (query and key of attention rotated
    together) is orthogonal to every right-hand side J, and singular.

    Raises:
        IndefiniteHessianError: the smallest Ritz value is too small a part of the largest.
    """
    smallest, largest = extreme_eigenvalues(product, like)
    if smallest <= smallest_allowed_ratio(like.dtype) * largest:
        raise IndefiniteHessianError(smallest=smallest, largest=largest)


def with_definite_products(objective: Objective, product_of: Callable[[Objective], Product]) -> Objective:
    """Return an objective whose products with A are positive definite: the given one, or else its copy in float64.

    In float32, round-off may give an A that is positive definite a negative Ritz value.

    Args:
        objective: the objective.
        product_of: makes the product v → A v of an objective.

    Raises:
        IndefiniteHessianError: A is not positive definite.
    """
    try:
        check_positive_definite(product_of(objective), objective.theta)
    except IndefiniteHessianError:
        wide = to_float64(objective)
        if wide is objective:
            raise
        check_positive_definite(product_of(wide), wide.theta)
        return wide
    return objective


def extreme_eigenvalues(
    product: Product, like: Tensor, *, columns: int = _COLUMNS, size: int = _SIZE
) -> tuple[float, float]:
    """The smallest and the largest Ritz value of a Krylov space of `size` vectors, for θ (P,) `like`.

    Ritz values lie within the spectrum. The smallest eigenvalue of A is at most the first, and the largest is at least
    the second; both are exact if `size` reaches P.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    start = torch.randn(columns, like.numel(), generator=generator, dtype=like.dtype, device=like.device)
    _, projected = krylov_basis(product, start, size=min(size, like.numel()))
    ritz = torch.linalg.eigvalsh(projected)
    return float(ritz[0]), float(ritz[-1])
