"""A low-rank approximation of a GGN: a few rows R with RᵀR ≈ G, for the dual form.

In coordinates in which the prior precision is the identity, θ = s θ̃ with s = 1/√δ, G̃ = s G s. Eigenvalues of G̃ compare
with 1 there, so the leading eigenvectors matter most. Block Lanczos gives a basis W of a Krylov space with
T = W (G̃ + I) Wᵀ, and Ritz pairs (μ, v) of G̃ in it. The Nyström rows of the r leading pairs are

    R̃ = μ^(−½) vᵀ G̃        R̃ᵀR̃ = G̃ V (Vᵀ G̃ V)⁻¹ Vᵀ G̃ ⪯ G̃        R = R̃ / s

They are √μ vᵀ for a converged pair, and RᵀR ⪯ G holds for all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.curvature.krylov.block_cg import check_condition
from estimators.curvature.krylov.block_lanczos import krylov_relation
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.errors import IllConditionedError, OptionError
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.objective.float64 import to_float64
from estimators.objective.objective import Objective
from estimators.runtime.memory import check_fits_memory

__all__ = ["low_rank_rows"]

_BLOCK = 8
"""Vectors per block: one pass over the data serves all of them."""
_OVERSAMPLING = 2
"""Krylov vectors per wanted row, so that the leading pairs converge."""


def low_rank_rows(objective: Objective, rank: int) -> Tensor:
    """R (r, P), r ≤ rank, of an objective with A = GGN + δ, by about 2·rank products with A.

    Products are in the dtype of the objective, or in float64 if these are not accurate enough.

    Raises:
        OptionError: some δ are 0.
        TooLargeError: the Krylov space does not fit into memory.
        IllConditionedError: float64 is needed on a device without it.
    """
    try:
        return _rows(objective, rank)
    except IllConditionedError:
        wide = to_float64(objective)
        if wide is objective:
            raise
        return _rows(wide, rank)


def _rows(objective: Objective, rank: int) -> Tensor:
    """R (r, P) by products in the dtype of the objective."""
    delta, theta = objective.prior.precision, objective.theta
    if not bool((delta > 0).all()):
        raise OptionError(
            'a positive prior_precision for every parameter with hessian_structure="lowrank"',
            received="0 for some",
            remedy='hessian_structure="full".',
        )
    size = min(_OVERSAMPLING * rank + 4 * _BLOCK, theta.numel())
    check_fits_memory(
        f"a Krylov space of {size} vectors of {theta.numel()} numbers",
        4 * size * theta.numel() * theta.element_size(),
        device=theta.device,
        remedy='a smaller rank, hessian_structure="ekfac", or RegVar.',
    )
    scale = delta.rsqrt()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(min(_BLOCK, theta.numel()), theta.numel(), generator=generator, dtype=torch.float64).to(theta)
    basis, projected, coupling = krylov_relation(
        PriorWhitening(scale, 1.0).product(objective.product), start, size=size
    )
    check_condition(projected, 1.0, theta.dtype)
    dtype = algebra_dtype(theta.device)
    eigenvalues, vectors = torch.linalg.eigh(projected.to(dtype))  # of T, ascending
    eigenvalues, vectors = eigenvalues.flip(0)[:rank] - 1, vectors.flip(1)[:, :rank]
    keep = eigenvalues > 16 * torch.finfo(theta.dtype).eps * (1 + eigenvalues[0])
    eigenvalues, vectors = eigenvalues[keep], vectors[:, keep]
    image = torch.cat([projected, coupling]).to(dtype)  # A Wᵀ = [W; Q]ᵀ [T; B]
    image[: len(projected)].diagonal().sub_(1)  # G̃ Wᵀ
    expansion = (image @ vectors / eigenvalues.sqrt()).T  # of the rows in [W; Q]
    rows: Tensor = (expansion @ to_algebra_dtype(basis)) / to_algebra_dtype(scale)
    return rows
