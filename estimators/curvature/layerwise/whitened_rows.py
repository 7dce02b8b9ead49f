"""Jacobian rows SᵀJ in factors at the training rows, with SSᵀ = Λ or its estimate by labels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from estimators.curvature.fisher import EXACT, Fisher
from estimators.models.jacobian_factors import LayerwiseRows
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective

__all__ = ["layers_of", "whitened_rows"]


def layers_of(objective: Objective) -> LayerwiseJacobian:
    """The layers of the network, traced at the first training row."""
    return LayerwiseJacobian(objective.network, next(iter(objective.batches)).x)


def whitened_rows(
    objective: Objective, layers: LayerwiseJacobian, fisher: Fisher = EXACT, *, pooled: bool = False
) -> Iterator[LayerwiseRows]:
    """Yield the rows SᵀJ of every training row, in factors; if `pooled`, with one position, as K-FAC "reduce" does."""

    def cotangents(f: Tensor, targets: PyTree) -> Tensor:
        return fisher.cotangents(objective.likelihood, f, targets)

    for x, targets in fisher.batches(objective):
        k = fisher.n_cotangents(layers.n_outputs)
        yield from layers.rows_at(x, cotangents, targets, n_cotangents=k, pooled=pooled)
