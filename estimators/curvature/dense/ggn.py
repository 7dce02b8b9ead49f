"""The data's part of A as GGN rows SᵀJ, rows of a sampled or empirical Fisher, a dense GGN or a dense Hessian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.curvature.fisher import EXACT, Fisher
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import select_rows, split_rows
from estimators.numerics.symmetric import add_gram, mirror
from estimators.objective.objective import Objective
from estimators.runtime.memory import rows_per_chunk

__all__ = ["dense_ggn", "dense_hessian", "ggn_rows"]


def ggn_rows(objective: Objective, fisher: Fisher = EXACT) -> Iterator[Tensor]:
    """Yield rows R = SᵀJ (B·C, P) with Λ = S Sᵀ, a chunk of B data at a time: Σ RᵀR = Σₙ Jₙᵀ Λₙ Jₙ.

    J has the network's dtype; S and R are in `algebra_dtype`. With another Fisher, G stands for S.
    """
    if fisher.kind != "exact":
        yield from _rows_of_labels(objective, fisher)
        return
    network = objective.network
    for batch in objective.batches:
        n_outputs = network.outputs(batch.x).shape[-1]
        chunk = rows_per_chunk(3 * n_outputs * network.n_parameters * algebra_dtype(network.theta.device).itemsize)
        for x, y in split_rows((batch.x, batch.y), chunk):
            root = objective.likelihood.given(y).hessian_sqrt(to_algebra_dtype(network.outputs(x)))
            rows = torch.einsum("bck,bcp->bkp", root, to_algebra_dtype(network.jacobian(x)))
            yield rows.reshape(-1, network.n_parameters)


def _rows_of_labels(objective: Objective, fisher: Fisher) -> Iterator[Tensor]:
    """Yield rows R = SᵀJ (B·K, P) in `algebra_dtype`, by K backward passes per row; no Jacobian is made."""
    network = objective.network
    for x, targets in fisher.batches(objective):
        n_cotangents = fisher.n_cotangents(network.outputs(select_rows(x, slice(0, 1))).shape[-1])
        chunk = rows_per_chunk(3 * n_cotangents * network.n_parameters * algebra_dtype(network.theta.device).itemsize)
        for part, of_part in split_rows((x, targets), chunk):
            u = fisher.cotangents(objective.likelihood, network.outputs(part), of_part)
            yield to_algebra_dtype(network.vjp_by_row(part, u).flatten(0, 1))


def dense_ggn(objective: Objective, fisher: Fisher = EXACT) -> Tensor:
    """Σₙ Jₙᵀ Λₙ Jₙ (P, P), or its estimate by labels, without the prior, in `algebra_dtype`."""
    n = objective.network.n_parameters
    total = objective.theta.new_zeros(n, n, dtype=algebra_dtype(objective.theta.device))
    for rows in ggn_rows(objective, fisher):
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
