"""The variance of a few linear functions of the weights, by conjugate gradients that continue from a Krylov space."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.curvature.krylov.block_lanczos import BlockLanczos
from estimators.numerics.reductions import inner

__all__ = ["variance_of_gradients"]


def variance_of_gradients(
    cycle: BlockLanczos, gradients: Tensor, *, tolerance: float, max_rank: int
) -> tuple[Tensor, Tensor]:
    """Return the variance gᵀA⁻¹g and its relative uncertainty, (m,) each.

    Galerkin's lower bound l rises by Δ per iteration. It rises about geometrically, so that Δ²/(Δ′ − Δ) is left, with
    Δ′ the rise before. The space itself stays as it is: the iterations are made in a branch, which is dropped.

    Args:
        cycle: the space.
        gradients: g in the coordinates of the space, (m, P).
        tolerance: relative uncertainty to reach, as a root mean square.
        max_rank: largest number of vectors of the branch. Without more room, the uncertainty is larger.
    """
    with cycle.branch(gradients) as branch:
        found = [_quadratic_forms(branch, gradients)]
        left = torch.full_like(found[0], torch.inf)
        while len(branch.block) and float((left / found[-1]).square().mean().sqrt()) > tolerance:
            if branch.rank + len(branch.block) > max_rank:
                break  # no room: what is left says how uncertain the variance is
            branch.extend()
            found.append(_quadratic_forms(branch, gradients))
            left = _expected_rise(found)
        if not len(branch.block):
            left = torch.zeros_like(left)
    left = torch.where(torch.isfinite(left), left, found[-1])
    return found[-1] + left, left / found[-1]


def _quadratic_forms(cycle: BlockLanczos, vectors: Tensor) -> Tensor:
    """Return bᵀ Wᵀ T⁻¹ W b for each of `vectors` b, (m,): lower bounds of bᵀA⁻¹b."""
    projected = inner(cycle.basis, vectors)  # W b
    forms: Tensor = (projected * torch.linalg.solve(cycle.projected, projected)).sum(0)
    return forms


def _expected_rise(found: list[Tensor]) -> Tensor:
    """Return by how much a sequence of lower bounds (m,) is expected to rise further; infinite for fewer than three."""
    if len(found) < 3:
        return torch.full_like(found[-1], torch.inf)
    before, last = (found[-2] - found[-3]).clamp_min(0), (found[-1] - found[-2]).clamp_min(0)
    return torch.where(last < before, last.square() / (before - last).clamp_min(torch.finfo(last.dtype).tiny), last)
