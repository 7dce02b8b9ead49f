"""Peak memory of a refit, relative to a plain training step, by the number of draws K: linear in K × P."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.fresh import in_fresh_process
from benchmarks.records import Measured
from estimators import FineTune, LinearResponse, PosteriorDraws, RegVar
from estimators.regvar.solvers import Solver
from estimators.training.training import Recipe

__all__ = ["SOLVERS", "measure_memory"]

_N_DRAWS = (4, 8, 16, 32)
_ROWS, _WIDTH = 256, 1024
SOLVERS: dict[str, Callable[[], Solver]] = {
    "FineTune, one copy at a time": partial(FineTune, recipe=Recipe(2, 64, "sgd", 1e-3), vmap_chunk_size=1),
    "LinearResponse": LinearResponse,
}


def measure_memory(name: str) -> Measured:
    """Return the peak memory in bytes by K and for a plain step, and the slope in units of P numbers."""
    plain = in_fresh_process(_plain)[1]
    peaks = [in_fresh_process(_fit, name, k)[1] for k in _N_DRAWS]
    n = sum(p.numel() for p in _network().parameters())
    slope, intercept = np.polyfit(_N_DRAWS, peaks, 1)
    return {
        "n_draws": list(_N_DRAWS),
        "peaks": peaks,
        "plain": plain,
        "n_parameters": n,
        "slope_in_p": float(slope) / 4 / n,
        "intercept": float(intercept),
    }


def _network() -> nn.Module:
    """Return a network of 2.2 million parameters."""
    torch.manual_seed(0)
    layers = (nn.Linear(64, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 10)).eval()


def _data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(64, 64), torch.randint(0, 10, (64,))) for _ in range(_ROWS // 64)]


def _plain() -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for x, y in _data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def _fit(name: str, n_draws: int) -> None:
    draws = PosteriorDraws(n_draws, rao_blackwell=None)
    RegVar(_network(), "classification", prior_precision=10.0, regularizer=draws, solver=SOLVERS[name]()).fit(_data())
