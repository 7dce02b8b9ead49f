"""A Krylov space that is extended until the bounds of the variance at given rows are close together."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from estimators.curvature.krylov.block_lanczos import BlockLanczos
from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.errors import NotConvergedWarning
from estimators.numerics.pytrees import PyTree, n_rows, select_rows
from estimators.objective.objective import Objective
from estimators.regvar.bounds import VarianceBounds
from estimators.regvar.probe_rows import output_gradient, unit_gradients
from estimators.regvar.solvers.to_tolerance import LinearResponseToTolerance

__all__ = ["refined_space"]

_TOGETHER = 32
"""Outputs that are solved for together: each iteration costs one product for each, in one pass over the data."""


def refined_space(objective: Objective, bounds: VarianceBounds, x: PyTree, rtol: float) -> KrylovSpace:
    """Extend a Krylov space until the bounds at every output of x differ by at most rtol times their mean.

    The gradients of outputs with wider bounds become further right-hand sides of the same solve. What the space has
    solved already is recycled, so that they need few products each.

    Args:
        objective: the centred objective.
        bounds: bounds from the space so far.
        x: M rows.
        rtol: relative distance of the bounds to reach.

    Returns:
        The larger space.

    Warns:
        NotConvergedWarning: if the space may not grow further before that.
    """
    space, max_rank = bounds.space, LinearResponseToTolerance.max_rank(objective)
    now = bounds.variance(x)

    def gradient_at(row: int, output: int) -> Tensor:
        return output_gradient(objective.network, select_rows(x, slice(row, row + 1)), output, now[0].shape[1])

    for row, output in _wide(now, rtol).tolist():  # most are narrow after their neighbours are solved
        if not len(_wide(bounds.variances_of_gradients(gradient_at(row, output))[-1], rtol)):
            continue
        pending = _wide(bounds.variance(select_rows(x, slice(row, n_rows(x)))), rtol)[:_TOGETHER].tolist()
        if not pending:  # narrow in the dtype of the network, by round-off
            continue
        gradients = unit_gradients(torch.cat([gradient_at(row + i, c) for i, c in pending]))
        space, converged = _extended(objective, bounds, gradients, rtol, max_rank)
        if not converged:
            warnings.warn(
                f"expected bounds within rtol={rtol:g} at all rows, received a space of {space.rank} vectors, the "
                "largest that fits, before that. Try fewer rows, or a subset_of_weights.",
                NotConvergedWarning,
                stacklevel=4,
            )
            break
        bounds = bounds.on(space)
    return space


def _wide(bounds: tuple[Tensor, Tensor], rtol: float) -> Tensor:
    """Return the indices of entries whose bounds differ by more than rtol times their mean, (n, dimensions)."""
    lower, upper = bounds
    return (2 * (upper - lower) > rtol * (upper + lower)).nonzero()


def _extended(
    objective: Objective, bounds: VarianceBounds, gradients: Tensor, rtol: float, max_rank: int
) -> tuple[KrylovSpace, bool]:
    """Return the space that contains the solutions for `gradients`, and whether their bounds are within rtol."""
    delta, space = objective.prior.precision, bounds.space
    coordinates = PriorWhitening.of(delta)
    cycle = BlockLanczos.continued(
        coordinates.product(objective.product),
        space.basis,
        space.galerkin * coordinates.unit,
        space.coupling * coordinates.unit,
        free_bytes=objective.available_bytes,
    )
    if bounds.untouched is not None:  # their variance is known
        gradients = gradients.masked_fill(bounds.untouched, 0.0)
    cycle.augment(coordinates.whiten_rhs(gradients))
    while len(cycle.block):
        if cycle.rank + len(cycle.block) > max_rank < delta.numel():
            return space, False
        cycle.extend()
        small = (cycle.projected, cycle.full_coupling())
        space = KrylovSpace.whitened(cycle.extended, *small, coordinates, delta)
        if not len(_wide(bounds.on(space).variances_of_gradients(gradients)[-1], rtol)):
            break
    return space, True
