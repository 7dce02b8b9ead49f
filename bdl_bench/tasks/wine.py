"""Wine from three cultivars: a classification of three classes on very few rows, and the same with noisy features.

Source: Aeberhard and Forina, "Wine" (UCI, 1992; CC BY 4.0), as bundled with scikit-learn. Size: 178 wines, 13 chemical
measurements, three classes.
Split: 90 train, 40 validation, 48 test rows, drawn by the seed. Inputs are standardised with the mean and standard
deviation of the training rows.
Shifts: the test rows with Gaussian noise of 0.25 to 1.25 standard deviations on every feature, five severities.
Model: MLP 13-16-3, tanh, float64, 275 parameters. Prior precision δ = 1, fixed, not tuned.
Recipe: Adam, 150 epochs, batches of 30, learning rate 0.01, cosine.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_wine
from torch import nn

from bdl_bench.data.shifts import feature_shifts
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_indices, standardised
from estimators.training.training import Recipe

__all__ = ["make_problem"]


@register("wine")
def make_problem(seed: int) -> Problem:
    """Classification: three cultivars from 13 measurements, and with noise on them, MLP 13-16-3, 90 training rows."""
    measurements, classes = load_wine(return_X_y=True)
    x, y = torch.from_numpy(measurements).double(), torch.from_numpy(classes).long()
    parts = split_indices(len(x), train=90, validation=40, seed=seed)
    x = standardised(x, parts[0])
    shifts = feature_shifts(x[parts[2]], seed)
    return Problem(
        _network(),
        "classification",
        *(loader(x[i], y[i]) for i in parts),
        prior_precision=1.0,
        recipe=Recipe(epochs=150, batch_size=30, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=_network,
        shifts={name: loader(noisy, y[parts[2]]) for name, noisy in shifts.items()},
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3)).double()
