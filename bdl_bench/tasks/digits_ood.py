"""Handwritten digits with two classes held out: trained on 0 to 7, asked about 8 and 9 as well.

Source and licence: as of `digits`. Size: 1443 images of the digits 0 to 7: 850 train, 250 validation, 343 test, drawn
by the seed. Out of distribution: all 354 images of 8 and 9, without targets, since the network has no such class.
Shifts: none; they are in `digits`.
Model: MLP 64-32-8, tanh, float64, 2344 parameters. Prior precision δ = 1, fixed, not tuned.
Recipe: Adam, 100 epochs, batches of 64, learning rate 0.01, cosine.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_indices
from estimators.training.training import Recipe

__all__ = ["make_problem"]

_HELD_OUT = 8
"""The first class that is."""


@register("digits-ood")
def make_problem(seed: int) -> Problem:
    """Classification: the digits 0 to 7, with 8 and 9 out of distribution, MLP 64-32-8, 850 training images."""
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).double() / 16, torch.from_numpy(classes).long()
    unseen, (x, y) = x[y >= _HELD_OUT], (x[y < _HELD_OUT], y[y < _HELD_OUT])
    parts = split_indices(len(x), train=850, validation=250, seed=seed)
    return Problem(
        _network(),
        "classification",
        *(loader(x[i], y[i]) for i in parts),
        prior_precision=1.0,
        recipe=Recipe(epochs=100, batch_size=64, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=_network,
        ood={"held-out": list(unseen.split(100))},
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, _HELD_OUT)).double()
