"""Draws ξ ~ N(0, GGN + δ) in one backward pass, without per-example gradients (docs/math.md, section 5)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective

__all__ = ["precision_noise"]


def precision_noise(objective: Objective, n_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ξ = Σₙ Jₙᵀ Sₙ gₙ + √δ z, (K, P), and z, (K, P), with g, z ~ N(0, I) and Λ = S Sᵀ."""
    theta, network = objective.theta, objective.network
    z = torch.randn(n_draws, theta.numel(), generator=generator, dtype=theta.dtype, device=theta.device)
    xi = objective.prior.precision.sqrt() * z

    def root_g(y: PyTree, f: Tensor) -> Tensor:
        g = torch.randn(n_draws, *f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return objective.likelihood.given(y).root_product(f, g)

    with network.pass_counter.phase("noise"), network.check.on_training_rows():
        for batch in objective.batches:
            network.outputs_and_vjp(batch.x, partial(root_g, batch.y), xi)
    return xi, z
