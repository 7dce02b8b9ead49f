"""What FineTune chooses by itself: the learning rate from curvatures of batches, and how many replicas go at once."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from estimators.batch import Batch
from estimators.objective import Objective
from estimators.training import Recipe, epoch

__all__ = ["auto_learning_rate", "replicas_at_once"]

_BATCHES, _POWER_STEPS = 4, 8
_WORTH_A_VECTOR = 2**20  # numbers in all replicas: on a CPU 8 times as fast at 3·10³ parameters each, slower at 8·10⁵


def auto_learning_rate(objective: Objective, recipe: Recipe, *, seed: int) -> float:
    """1 / the largest curvature of the mean loss that some batches show: half of what plain descent would bear."""
    generator = torch.Generator().manual_seed(seed)
    batches = islice(epoch(objective.batches, recipe, generator), _BATCHES)
    v = torch.randn(objective.theta.numel(), generator=generator).to(objective.theta)
    with objective.network.ledger.part("search for lr"):
        largest = max(_largest_curvature(objective, batch, v) for batch in batches)
    return 1 / largest


def _largest_curvature(objective: Objective, batch: Batch, v: Tensor) -> float:
    """Power iteration on the batch's mean curvature plus δ/N."""
    prior = objective.prior.precision / objective.batches.n_data
    value = v.new_zeros(())
    for _ in range(_POWER_STEPS):
        v = v / v.norm()
        image = objective.data_term.curvature_product(objective.network, batch, v[None])[0] / len(batch) + prior * v
        value, v = image.norm(), image
    return float(value)


def replicas_at_once(objective: Objective) -> int:
    """Replicas in one vectorised call: bounded by memory; on a CPU by what is worth it, and one for convolutions."""
    modules, at_once = objective.network.module.modules(), objective.network.vectors_at_once
    if objective.theta.device.type != "cpu":
        return at_once
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in modules):
        return 1
    return min(at_once, max(1, _WORTH_A_VECTOR // objective.theta.numel()))
