"""The digits of `digits`, its split and its shifts, by a convolutional network with group normalisation.

Source, licence, sizes, split and shifts: as of `digits`.
Model: two strided convolutions of 8 and 16 channels with GroupNorm, and a linear layer; float64, 1946 parameters.
Prior precision δ = 1, fixed, not tuned.
Recipe: Adam, 30 epochs, batches of 64, learning rate 0.01, cosine.
"""

from __future__ import annotations

from torch import nn

from bdl_bench.networks.small import group_norm
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.digits import digits_problem
from bdl_bench.tasks.registry import register
from estimators.training.training import Recipe

__all__ = ["make_problem"]


@register("digits-cnn")
def make_problem(seed: int) -> Problem:
    """Classification: the images of digits, and shifted, GroupNorm CNN of 1946 parameters, 1000 training images."""
    recipe = Recipe(epochs=30, batch_size=64, optimizer="adam", lr=1e-2, schedule="cosine")
    return digits_problem(seed, _network, (1, 8, 8), recipe)


def _network() -> nn.Module:
    return group_norm().double()
