"""Conjugate gradients for many systems side by side, each with a matrix of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["InnerSolution", "conjugate_gradients"]

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InnerSolution:
    """`solution` (A, P); where `negative_curvature` (A,) is true it is the iterate before that curvature was met.

    `curvature` (A,): the size of the Rayleigh quotient along the first direction.
    """

    solution: Tensor
    negative_curvature: Tensor
    curvature: Tensor
    iterations: int


def conjugate_gradients(
    product: Apply, rhs: Tensor, *, precondition: Apply | None, tol: float, max_iter: int
) -> InnerSolution:
    """H_a u_a = b_a for rhs (A, P) to ‖b − H u‖ ≤ tol ‖b‖ or to negative curvature (Steihaug 1983)."""
    precondition = precondition or (lambda v: v)
    u, residual = torch.zeros_like(rhs), rhs
    z = precondition(residual)
    direction, rho = z, _dot(residual, z)
    target = tol * rhs.norm(dim=1)
    negative = torch.zeros_like(target, dtype=torch.bool)
    curvature, iterations = torch.zeros_like(target), 0
    active = residual.norm(dim=1) > target
    while iterations < max_iter and bool(active.any()):
        image = product(direction)
        bend = _dot(direction, image)
        if iterations == 0:
            curvature = bend.abs() / _dot(direction, direction).clamp_min(torch.finfo(rhs.dtype).tiny)
        negative |= active & ~(bend > 0)
        active &= bend > 0
        step = torch.where(active, rho / torch.where(active, bend, 1.0), 0.0)[:, None]
        u, residual = u + step * direction, residual - step * image
        z = precondition(residual)
        rho_next = _dot(residual, z)
        direction = z + torch.where(active, rho_next / torch.where(active, rho, 1.0), 0.0)[:, None] * direction
        rho = rho_next
        iterations += 1
        active &= residual.norm(dim=1) > target
    return InnerSolution(u, negative, curvature, iterations)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
