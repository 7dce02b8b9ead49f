"""The layers of an objective's network, and its Jacobian rows in factors along the columns of S."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from estimators.models.layer_jacobians import LayerwiseJacobian, LayerwiseRows
from estimators.numerics.dtype import to_algebra_dtype
from estimators.objective.objective import Objective

__all__ = ["layers_of", "whitened_rows"]


def layers_of(objective: Objective) -> LayerwiseJacobian:
    """As the first training row shows them."""
    return LayerwiseJacobian(objective.network, next(iter(objective.batches)).x)


def whitened_rows(objective: Objective, layers: LayerwiseJacobian) -> Iterator[LayerwiseRows]:
    """Along the columns of S, Λ = SSᵀ, at every training row."""

    def root(f: Tensor, y: Tensor) -> Tensor:
        return objective.likelihood.given(y).hessian_sqrt(to_algebra_dtype(f)).transpose(1, 2).to(f.dtype)

    for batch in objective.batches:
        yield from layers.at(batch.x, root, batch.y)
