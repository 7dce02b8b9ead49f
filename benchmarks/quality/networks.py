"""Two networks on digits, trained by minibatch Adam for 100 epochs, as is usual, rather than until convergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bdl_bench.problem.problem import Problem
from bdl_bench.tasks import TASKS
from estimators.training.training import Recipe, train_map

__all__ = ["NETWORKS", "trained_problem"]

_CNN_ROWS = 700


def _mlp(dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 10)).double()


def _cnn(dropout: float) -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(512, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 10)),
    ).double()


NETWORKS: dict[str, tuple[Callable[[float], nn.Module], float]] = {"mlp": (_mlp, 1e-2), "cnn": (_cnn, 3e-3)}
"""The function that builds each network from a dropout rate, and the learning rate of Adam."""


def trained_problem(name: str, delta: float, seed: int, *, dropout: float = 0.0) -> Problem:
    """Return a problem with the digits of a seed, a network trained on them, and the recipe to train others."""
    make, lr = NETWORKS[name]
    data = TASKS["digits"].problem(seed)
    torch.manual_seed(1000 * seed)
    loader = list(data.train) if name == "mlp" else _first_rows(data, _CNN_ROWS)
    model = make(dropout)
    recipe = Recipe(epochs=100, batch_size=64, optimizer="adam", lr=lr)
    train_map(model, "classification", loader, prior_precision=delta, recipe=recipe)
    options: dict[str, Any] = {"recipe": recipe, "make_model": lambda: make(dropout)}
    return Problem(model, "classification", loader, loader, data.test, prior_precision=delta, **options)


def _first_rows(problem: Problem, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the first n training rows, in batches of 64."""
    batches = list(problem.train)
    x, y = torch.cat([x for x, _ in batches])[:n], torch.cat([y for _, y in batches])[:n]
    return list(zip(x.split(64), y.split(64), strict=True))
