"""Draws ξ ~ N(0, GGN + δ): one backward pass over the data, no per-example bookkeeping (docs/math.md, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.objective import Objective

__all__ = ["precision_noise"]


def precision_noise(objective: Objective, n_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ξ = Σₙ Jₙᵀ Sₙ gₙ + √δ z with g, z ~ N(0, I), Λ = S Sᵀ: ξ (K, P), and z (K, P)."""
    theta, network = objective.theta, objective.network
    z = torch.randn(n_draws, theta.numel(), generator=generator, dtype=theta.dtype, device=theta.device)
    xi = objective.prior.precision.sqrt() * z
    for batch in objective.batches:
        f = network.outputs(batch.x)
        g = torch.randn(n_draws, *f.shape, generator=generator, dtype=f.dtype, device=f.device)
        xi += network.vjp(batch.x, objective.likelihood.given(batch.y).root_product(f, g))
    return xi, z
