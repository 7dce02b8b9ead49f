"""Choice of a learning rate from the curvature of some batches."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from estimators.data.batch import Batch
from estimators.objective.objective import Objective
from estimators.training.training import Recipe, epoch

__all__ = ["auto_learning_rate"]

_BATCHES = 4
"""Batches whose curvature is measured."""
_POWER_STEPS = 8
"""Steps of the power iteration per batch."""


def auto_learning_rate(objective: Objective, recipe: Recipe, *, seed: int) -> float:
    """Return 1 / the largest curvature of the mean loss over some batches: half of what gradient descent allows."""
    generator = torch.Generator().manual_seed(seed)
    batches = islice(epoch(objective.batches, recipe, generator), _BATCHES)
    v = torch.randn(objective.theta.numel(), generator=generator).to(objective.theta)
    with objective.network.pass_counter.phase("search for lr"):
        largest = max(_largest_curvature(objective, batch, v) for batch in batches)
    return 1 / largest


def _largest_curvature(objective: Objective, batch: Batch, v: Tensor) -> float:
    """Return the largest eigenvalue of the batch's mean curvature plus δ/N, by power iteration."""
    prior = objective.prior.precision / objective.batches.n_data
    value = v.new_zeros(())
    for _ in range(_POWER_STEPS):
        v = v / v.norm()
        image = objective.data_term.curvature_product(objective.network, batch, v[None])[0] / len(batch) + prior * v
        value, v = image.norm(), image
    return float(value)
