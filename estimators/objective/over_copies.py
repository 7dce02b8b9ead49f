"""A function of several weight vectors at one batch: vectorised by vmap, and compared with a loop once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value

from estimators.data.batch import Batch
from estimators.models.kernels import differentiable
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.numerics.vectorize import one_by_one, over_rows
from estimators.objective.objective import Objective

__all__ = ["data_gradients", "over_copies"]


def over_copies(
    network: Network,
    function: Callable[..., Tensor],
    x: PyTree,
    *rows: PyTree,
    chunk_size: int | None = None,
    compared: bool = True,
    **multiples: float,
) -> Tensor:
    """Return `function` of each row of the arguments; from then on in a loop if vmap is wrong for this network.

    Args:
        network: the network that `function` calls.
        function: a function of one row of each of `rows`.
        x: inputs of the batch, which tell whether this kind of call has been compared.
        rows: the arguments, A rows each.
        chunk_size: rows in one vectorised call; None for all.
        compared: whether a new kind of call is compared with a loop.
        multiples: what the forwards stand for, as for `PassCounter.transformed`.

    Returns:
        The results, (A, ...).
    """
    first = rows[0]
    assert isinstance(first, Tensor)
    if network.routes.copies_in_a_loop:
        return _in_a_loop(network, function, rows, multiples)
    with differentiable(), network.pass_counter.transformed(**multiples) as counted:
        found: Tensor = over_rows(counted(function), *rows, chunk_size=chunk_size)
    n_copies = len(first)
    if n_copies == 1 or not compared or not network.check.is_new("copies", x, len(rows) - 1, n_copies):
        return found
    with network.check.counted():
        looped = _in_a_loop(network, function, rows, multiples)
    distance, scale = float((looped.double() - found.double()).norm()), float(looped.double().norm())
    if not scale < float("inf"):
        return found  # a copy that has diverged, which says nothing about vmap
    round_off = torch.finfo(looped.dtype).eps ** 0.5 * looped.numel() ** 0.5
    if distance <= network.check.tolerance() * max(scale, round_off):
        return found
    network.routes.copies_in_a_loop = True
    reason = f"differs from a loop by {distance:.2g} at a norm of {scale:.2g}"
    network.check.report.record_fallback("perturbed copies", "vmap over them", reason, instead="one at a time")
    return looped


def data_gradients(objective: Objective, thetas: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the data term of a batch at several weight vectors, and its gradients, without the prior.

    Args:
        objective: the objective, L.
        thetas: θ_a, (A, P).
        batch: B rows.

    Returns:
        Σ −log p(y | f(x; θ_a)) over the rows, (A,), and its gradients, (A, P), without a graph.
    """
    network, copies = objective.network, len(thetas)
    targets = objective.data_term.targets(network, batch)

    def loss(theta: Tensor) -> Tensor:
        return objective.data_term.loss(network, theta, batch.x, targets)

    def slope_and_value(theta: Tensor) -> Tensor:  # θ → (∇ℓ, ℓ) as one vector
        gradient, value = grad_and_value(loss)(theta)
        return torch.cat([gradient, value.reshape(1)])

    found = over_copies(network, slope_and_value, batch.x, thetas, forward=copies, backward=copies).detach()
    return found[:, -1], found[:, :-1]


def _in_a_loop(
    network: Network, function: Callable[..., Tensor], rows: tuple[PyTree, ...], multiples: dict[str, float]
) -> Tensor:
    """Return `function` of each row, one after another."""
    with differentiable(), network.pass_counter.transformed(**multiples) as counted:
        looped: Tensor = one_by_one(counted(function), rows)
    return looped
