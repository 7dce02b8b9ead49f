"""Handwritten digits of 8 × 8 pixels, a small classification of ten classes.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998; CC BY 4.0), its test part, as
bundled with scikit-learn. Size: 1797 images of 64 pixels (0 to 16, divided by 16).
Split: 1000 train, 297 validation, 500 test images, drawn by the seed.
Model: MLP 64-32-10, tanh, float64, 2410 parameters. Prior precision δ = 1, fixed, not tuned.
Recipe: Adam, 100 epochs, batches of 64, learning rate 0.01, cosine.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from bdl_bench.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_indices
from estimators.training import Recipe

__all__ = ["make_problem"]


@register("digits", default=True)
def make_problem(seed: int) -> Problem:
    """Classification: handwritten digits of 8 x 8 pixels, MLP 64-32-10, 1000 training images."""
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).double() / 16, torch.from_numpy(classes).long()
    parts = split_indices(len(x), train=1000, validation=297, seed=seed)
    return Problem(
        _network(),
        "classification",
        *(loader(x[i], y[i]) for i in parts),
        prior_precision=1.0,
        recipe=Recipe(epochs=100, batch_size=64, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=_network,
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
