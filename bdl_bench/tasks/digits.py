"""Handwritten digits of 8 × 8 pixels, a small classification of ten classes, and the same shifted.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998; CC BY 4.0), its test part, as
bundled with scikit-learn. Size: 1797 images of 64 pixels (0 to 16, divided by 16).
Split: 1000 train, 297 validation, 500 test images, drawn by the seed.
Shifts: the first 200 test images under noise, rotation and loss of contrast, five severities each.
Model: MLP 64-32-10, tanh, float64, 2410 parameters. Prior precision δ = 1, fixed, not tuned.
Recipe: Adam, 100 epochs, batches of 64, learning rate 0.01, cosine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

from bdl_bench.data.shifts import image_shifts
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_indices
from estimators.training.training import Recipe

__all__ = ["digits_problem", "make_problem"]

_SHIFTED_ROWS = 200


@register("digits", default=True)
def make_problem(seed: int) -> Problem:
    """Classification: handwritten digits of 8 x 8 pixels, and shifted, MLP 64-32-10, 1000 training images."""
    recipe = Recipe(epochs=100, batch_size=64, optimizer="adam", lr=1e-2, schedule="cosine")
    return digits_problem(seed, _network, (64,), recipe)


def digits_problem(seed: int, network: Callable[[], nn.Module], shape: tuple[int, ...], recipe: Recipe) -> Problem:
    """The split and the shifts of this module for another network, which sees images of `shape`."""
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).double().reshape(-1, *shape) / 16, torch.from_numpy(classes).long()
    parts = split_indices(len(x), train=1000, validation=297, seed=seed)
    shifted = parts[2][:_SHIFTED_ROWS]
    shifts = image_shifts(x[shifted].reshape(-1, 8, 8), seed)
    return Problem(
        network(),
        "classification",
        *(loader(x[i], y[i]) for i in parts),
        prior_precision=1.0,
        recipe=recipe,
        make_model=network,
        shifts={name: loader(images.reshape(-1, *shape), y[shifted]) for name, images in shifts.items()},
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
