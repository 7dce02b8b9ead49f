"""Diabetes progression, a small regression with much noise.

Source: Efron, Hastie, Johnstone and Tibshirani, "Least Angle Regression" (2004), as bundled with scikit-learn (BSD).
Size: 442 patients, 10 measurements, one target (disease progression after a year).
Split: 300 train, 42 validation, 100 test rows, drawn by the seed. Inputs and target are standardised with the mean and
standard deviation of the training rows, so that errors are in standard deviations of the training target.
Model: MLP 10-50-1, tanh, float64, 601 parameters. Likelihood: Gaussian, σ = 0.7 (about the residual spread of a linear
fit). Prior precision δ = 1. Both are fixed, not tuned.
Recipe: Adam, 150 epochs, batches of 50, learning rate 0.01, cosine.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import nn

from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_indices, standardised
from estimators.likelihoods import Gaussian
from estimators.training.training import Recipe

__all__ = ["make_problem"]


@register("diabetes", default=True)
def make_problem(seed: int) -> Problem:
    """Regression: progression of diabetes from 10 measurements, MLP 10-50-1, 300 training rows."""
    x, y = (torch.from_numpy(array).double() for array in load_diabetes(return_X_y=True, scaled=False))
    y = y.unsqueeze(-1)
    parts = split_indices(len(x), train=300, validation=42, seed=seed)
    x, y = standardised(x, parts[0]), standardised(y, parts[0])
    return Problem(
        _network(),
        Gaussian(sigma_noise=0.7),
        *(loader(x[i], y[i]) for i in parts),
        prior_precision=1.0,
        recipe=Recipe(epochs=150, batch_size=50, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=_network,
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1)).double()
