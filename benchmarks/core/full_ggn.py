"""The full GGN: dense with many rows, dense and dual with few, and one that is too large to be dense."""

from __future__ import annotations

from functools import partial

from torch import nn

from bdl_bench.networks.small import mlp
from benchmarks.core.work import Work
from estimators import LinearizedLaplace

__all__ = ["ROWS"]

# Ours factors A in fit, laplace-torch at the first variance, so that goals are set on the sum of both.

_THEIRS = {"subset_of_weights": "all", "hessian_structure": "full"}
_MATRICES = 5  # P×P matrices at a time while laplace-torch inverts: H, H + δ, its flip, their factor and the inverse


def _exact(model: nn.Module, likelihood: str, inverse: str) -> LinearizedLaplace:
    return LinearizedLaplace(model, likelihood, inverse=inverse)


def _one_output(title: str, hidden: int, inverse: str) -> partial[Work]:
    return partial(
        Work,
        title,
        partial(mlp, 64, hidden, 1),
        (64,),
        partial(_exact, likelihood="regression", inverse=inverse),
        _THEIRS,
        likelihood="regression",
    )


ROWS = {
    "full-3k": Work(
        "full GGN, P = 3,010, C = 10",
        partial(mlp, 64, 40, 10),
        (64,),
        partial(_exact, likelihood="classification", inverse="cholesky"),
        _THEIRS,
        goals={"fit": 2, "fit + first variance": 2.5, "later variance": 10},
    ),
    "full-10k": _one_output("full GGN, P = 10,033, C = 1, dense", 152, "cholesky")(
        goals={"fit + first variance": 5, "later variance": 200}
    ),
    "full-10k-dual": _one_output("full GGN, P = 10,033, C = 1, dual form", 152, "dual")(
        goals={"fit + first variance": 100}
    ),
    "full-30k": _one_output("full GGN, P = 30,031, C = 1, dual form", 455, "dual")(
        their_bytes=_MATRICES * 4 * 30031**2
    ),
}
