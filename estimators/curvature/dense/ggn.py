"""The data's part of A as GGN rows SᵀJ, a dense GGN or a dense Hessian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import split_rows
from estimators.numerics.symmetric import add_gram, mirror
from estimators.objective.objective import Objective
from estimators.runtime.memory import rows_per_chunk

__all__ = ["dense_ggn", "dense_hessian", "ggn_rows"]


def ggn_rows(objective: Objective) -> Iterator[Tensor]:
    """Yield rows R = SᵀJ (B·C, P) with Λ = S Sᵀ, a chunk of B data at a time: Σ RᵀR = Σₙ Jₙᵀ Λₙ Jₙ.

    J has the network's dtype; S and R are in `algebra_dtype`.
    """
    network = objective.network
    for batch in objective.batches:
        n_outputs = network.outputs(batch.x).shape[-1]
        chunk = rows_per_chunk(3 * n_outputs * network.n_parameters * algebra_dtype(network.theta.device).itemsize)
        for x, y in split_rows((batch.x, batch.y), chunk):
            root = objective.likelihood.given(y).hessian_sqrt(to_algebra_dtype(network.outputs(x)))
            rows = torch.einsum("bck,bcp->bkp", root, to_algebra_dtype(network.jacobian(x)))
            yield rows.reshape(-1, network.n_parameters)


def dense_ggn(objective: Objective) -> Tensor:
    """Σₙ Jₙᵀ Λₙ Jₙ (P, P), without the prior, in `algebra_dtype`."""
    n = objective.network.n_parameters
    total = objective.theta.new_zeros(n, n, dtype=algebra_dtype(objective.theta.device))
    for rows in ggn_rows(objective):
        add_gram(total, rows.T)
    mirror(total)
    return total


def dense_hessian(objective: Objective) -> Tensor:
    """The Hessian (P, P) of the data term at θ̂, without the prior; symmetrised against round-off."""
    network = objective.network
    total = objective.theta.new_zeros(network.n_parameters, network.n_parameters)
    eye = torch.eye(network.n_parameters, dtype=total.dtype, device=total.device)
    for batch in objective.batches:
        objective.data_term.curvature_product(network, batch, eye, total)
    return 0.5 * (total + total.T)
