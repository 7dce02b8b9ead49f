"""Breast cancer, malignant or benign: a binary classification by one logit, and the same with noisy features.

Source: Wolberg, Mangasarian, Street and Street, "Breast Cancer Wisconsin (Diagnostic)" (UCI, 1995; CC BY 4.0), as
bundled with scikit-learn. Size: 569 patients, 30 measurements of cell nuclei, the target 1 for benign.
Split: 300 train, 119 validation, 150 test rows, drawn by the seed. Inputs are standardised with the mean and standard
deviation of the training rows.
Shifts: the test rows with Gaussian noise of 0.25 to 1.25 standard deviations on every feature, five severities.
Model: MLP 30-16-1, tanh, float64, 513 parameters. Prior precision δ = 1, fixed, not tuned.
Recipe: Adam, 80 epochs, batches of 50, learning rate 0.01, cosine.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from bdl_bench.data.shifts import feature_shifts
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_indices, standardised
from estimators.training.training import Recipe

__all__ = ["make_problem"]


@register("breast-cancer")
def make_problem(seed: int) -> Problem:
    """Binary: malignant or benign from 30 measurements, and with noise on them, MLP 30-16-1, 300 training rows."""
    x, y = (torch.from_numpy(array).double() for array in load_breast_cancer(return_X_y=True))
    parts = split_indices(len(x), train=300, validation=119, seed=seed)
    x, y = standardised(x, parts[0]), y.unsqueeze(-1)
    shifts = feature_shifts(x[parts[2]], seed)
    return Problem(
        _network(),
        "binary",
        *(loader(x[i], y[i]) for i in parts),
        prior_precision=1.0,
        recipe=Recipe(epochs=80, batch_size=50, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=_network,
        shifts={name: loader(noisy, y[parts[2]]) for name, noisy in shifts.items()},
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 1)).double()
