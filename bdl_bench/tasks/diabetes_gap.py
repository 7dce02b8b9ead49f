"""Diabetes progression with a gap: one measurement decides which patients are never trained on.

Source: as of `diabetes` (scikit-learn, BSD). The split is a "gap" split (Foong et al. 2019): rows are sorted by one of
the nine measurements that are not two-valued (all but sex), the one of number seed mod 9; the middle third is out of
distribution, with targets.
Size: 294 rows outside the gap: 206 train, 44 validation, 44 test, drawn by the seed; 148 rows in the gap. Inputs and
target are standardised with the mean and standard deviation of the training rows.
Model: MLP 10-50-1, tanh, float64, 601 parameters. Likelihood: Gaussian, σ = 0.7. Prior precision δ = 1. Both are fixed,
not tuned.
Recipe: Adam, 150 epochs, batches of 50, learning rate 0.01, cosine.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import nn

from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import gap_split, loader, standardised
from estimators.likelihoods import Gaussian
from estimators.training.training import Recipe

__all__ = ["make_problem"]

_FEATURES = (0, 2, 3, 4, 5, 6, 7, 8, 9)


@register("diabetes-gap")
def make_problem(seed: int) -> Problem:
    """Regression: diabetes without the middle third of one measurement, MLP 10-50-1, 206 training rows."""
    x, y = (torch.from_numpy(array).double() for array in load_diabetes(return_X_y=True, scaled=False))
    y = y.unsqueeze(-1)
    split = gap_split(x[:, _FEATURES[seed % len(_FEATURES)]], train=0.7, validation=0.15, seed=seed)
    x, y = standardised(x, split.parts[0]), standardised(y, split.parts[0])
    return Problem(
        _network(),
        Gaussian(sigma_noise=0.7),
        *(loader(x[i], y[i]) for i in split.parts),
        prior_precision=1.0,
        recipe=Recipe(epochs=150, batch_size=50, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=_network,
        ood={"gap": loader(x[split.gap], y[split.gap])},
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1)).double()
