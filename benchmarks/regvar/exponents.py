"""Growth of the seconds of a fit with N and with P: slopes in logarithms over a decade of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.clock import interleaved, timed
from benchmarks.records import Measured
from estimators import FineTune, LinearResponse, PosteriorDraws, RegVar
from estimators.errors import NotConvergedWarning
from estimators.regvar.solvers import Solver
from estimators.training.training import Recipe

__all__ = ["DRAWS", "N_DATA", "SOLVERS", "measure_exponents"]

SOLVERS: dict[str, tuple[Callable[[], Solver], str]] = {
    "FineTune": (partial(FineTune, recipe=Recipe(5, 64, "sgd", 1e-3)), "monte_carlo"),
    "LinearResponse": (LinearResponse, "bounds"),
}
"""Solvers and their variance estimates; with "bounds" a solve has a fixed number of products."""
DRAWS, N_DATA, _WIDTH = 4, 1024, 256
_ROWS = (512, 1024, 2048, 5120)
_WIDTHS = (256, 384, 560, 864)  # of two hidden layers: 85 thousand to 820 thousand parameters


def measure_exponents(name: str) -> Measured:
    """Return seconds by N and by P, and the exponents."""
    by_rows = _seconds([partial(_fit, name, n, _WIDTH) for n in _ROWS])
    by_width = _seconds([partial(_fit, name, N_DATA, width) for width in _WIDTHS])
    sizes = [sum(p.numel() for p in _network(width).parameters()) for width in _WIDTHS]
    return {
        "rows": list(_ROWS),
        "seconds_by_rows": by_rows,
        "sizes": sizes,
        "seconds_by_size": by_width,
        "exponent_in_n": _slope(_ROWS, by_rows),
        "exponent_in_p": _slope(sizes, by_width),
    }


def _seconds(fits: list[Callable[[], object]]) -> list[float]:
    fits[0]()  # a warm-up, which is not measured
    return [timing.median for (timing,) in interleaved([lambda fit=fit: [timed(fit)] for fit in fits])]  # type: ignore[misc]


def _slope(sizes: tuple[int, ...] | list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    return nn.Sequential(*layers).eval()


def _fit(name: str, n_data: int, width: int) -> None:
    solver, variance_estimate = SOLVERS[name]
    model = _network(width)
    # The cost of Rao-Blackwellisation is cubic in the size of the last layer.
    draws = PosteriorDraws(DRAWS, rao_blackwell=None, variance_estimate=variance_estimate)
    loader = [(torch.randn(64, 64), torch.randint(0, 10, (64,))) for _ in range(n_data // 64)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        RegVar(model, "classification", prior_precision=10.0, regularizer=draws, solver=solver()).fit(loader)
