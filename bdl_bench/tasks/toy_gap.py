"""In-between regression: two clusters of inputs, and a gap between them, in which a method should be uncertain.

Source: Foong, Li, Hernández-Lobato and Turner, "In-Between Uncertainty in Bayesian Neural Networks" (2019); made here,
nothing is downloaded. x uniform on [−1, −0.7] and on [0.5, 1], y = cos(4x + 0.8) + 0.1 ε.
Size: 100 train, 40 validation, 100 test rows, half in each cluster, drawn by the seed. Out of distribution: 100 rows
uniform on (−0.7, 0.5), with targets. Plot grid: 301 points from −1.5 to 1.5 with the noiseless y. Nothing is
standardised, since inputs and target are of order one already.
Model: MLP 1-50-1, tanh, float64, 151 parameters. Likelihood: Gaussian, σ = 0.1, the true noise. Prior precision
δ = 0.1, fixed, not tuned: with δ = 1 such a network underfits.
Recipe: Adam, 700 epochs, batches of 50, learning rate 0.03, cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader
from estimators.likelihoods import Gaussian
from estimators.training.training import Recipe

__all__ = ["make_problem"]

_CLUSTERS, _GAP, _PLOT_GRID = ((-1.0, -0.7), (0.5, 1.0)), (-0.7, 0.5), (-1.5, 1.5)
_NOISE = 0.1


@register("toy-gap", real=False)
def make_problem(seed: int) -> Problem:
    """Regression: one input, two clusters and a gap between them, MLP 1-50-1, 100 training rows."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.cat([_uniform(n // 2, cluster, generator) for cluster in _CLUSTERS]) for n in (100, 40, 100)]
    gap = _uniform(100, _GAP, generator)
    line = torch.linspace(*_PLOT_GRID, 301, dtype=torch.float64).unsqueeze(1)
    return Problem(
        _network(),
        Gaussian(sigma_noise=_NOISE),
        *(loader(x, _measured(x, generator)) for x in parts),
        prior_precision=0.1,
        recipe=Recipe(epochs=700, batch_size=50, optimizer="adam", lr=3e-2, schedule="cosine"),
        make_model=_network,
        ood={"gap": loader(gap, _measured(gap, generator))},
        plot_grid=loader(line, _truth(line), batch_size=len(line)),
    )


def _uniform(n: int, ends: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = ends
    return low + (high - low) * torch.rand(n, 1, generator=generator, dtype=torch.float64)


def _truth(x: Tensor) -> Tensor:
    return torch.cos(4 * x + 0.8)


def _measured(x: Tensor, generator: torch.Generator) -> Tensor:
    return _truth(x) + _NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)).double()
