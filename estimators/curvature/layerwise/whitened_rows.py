"""Jacobian rows in factors along the columns of S, with Λ = SSᵀ, at the training rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from estimators.models.layer_jacobians import LayerwiseJacobian, LayerwiseRows
from estimators.numerics.dtype import to_algebra_dtype
from estimators.objective.objective import Objective

__all__ = ["layers_of", "whitened_rows"]


def layers_of(objective: Objective) -> LayerwiseJacobian:
    """The layers of the network, traced at the first training row."""
    return LayerwiseJacobian(objective.network, next(iter(objective.batches)).x)


def whitened_rows(objective: Objective, layers: LayerwiseJacobian) -> Iterator[LayerwiseRows]:
    """Yield the rows SᵀJ of every training row, in factors."""

    def root(f: Tensor, y: Tensor) -> Tensor:
        return objective.likelihood.given(y).hessian_sqrt(to_algebra_dtype(f)).transpose(1, 2).to(f.dtype)

    for batch in objective.batches:
        yield from layers.rows_at(batch.x, root, batch.y)
