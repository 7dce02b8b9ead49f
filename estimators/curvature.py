"""The data's part of A: GGN rows SᵀJ, dense GGN, dense Hessian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.jacobians import JacobianRows
from estimators.memory import rows_per_chunk
from estimators.objective import Objective
from estimators.precision.dtype import algebra_dtype
from estimators.pytrees import split_rows

__all__ = ["dense_ggn", "dense_hessian", "ggn_rows"]

_BLOCK = 512


def ggn_rows(objective: Objective, jacobian: JacobianRows) -> Iterator[Tensor]:
    """Rows R with Σ RᵀR = Σₙ Jₙᵀ Λₙ Jₙ, a chunk of B rows at a time: (B·C, P), R = Sᵀ J with Λ = S Sᵀ."""
    network = objective.network
    for batch in objective.batches:
        n_outputs = network.outputs(batch.x).shape[-1]
        chunk = rows_per_chunk(3 * n_outputs * network.n_parameters * network.theta.element_size())
        for x, y in split_rows((batch.x, batch.y), chunk):
            root = objective.likelihood.given(y).hessian_sqrt(network.outputs(x))
            rows = torch.einsum("bck,bcp->bkp", root, jacobian(x))
            yield rows.reshape(-1, network.n_parameters)


def dense_ggn(objective: Objective, jacobian: JacobianRows) -> Tensor:
    """Σₙ Jₙᵀ Λₙ Jₙ, (P, P), without the prior, in `algebra_dtype`."""
    n = objective.network.n_parameters
    total = objective.theta.new_zeros(n, n, dtype=algebra_dtype(objective.theta.device))
    for rows in ggn_rows(objective, jacobian):
        wide = rows.to(total.dtype)
        for below, columns in _lower_blocks(n):  # half of RᵀR is the other half
            total[below, columns].addmm_(wide[:, below].T, wide[:, columns])
    for below, columns in _lower_blocks(n):
        total[columns, below] = total[below, columns].T.clone()
    return total


def _lower_blocks(n: int) -> Iterator[tuple[slice, slice]]:
    """Rows from the diagonal on, and columns, that together are the lower triangle of (n, n)."""
    for start in range(0, n, _BLOCK):
        yield slice(start, n), slice(start, min(start + _BLOCK, n))


def dense_hessian(objective: Objective) -> Tensor:
    """∇² of the data term at θ̂, (P, P), without the prior; symmetrised against round-off."""
    network = objective.network
    total = objective.theta.new_zeros(network.n_parameters, network.n_parameters)
    eye = torch.eye(network.n_parameters, dtype=total.dtype, device=total.device)
    for batch in objective.batches:
        total += objective.data_term.curvature_product(network, batch, eye)
    return 0.5 * (total + total.T)
