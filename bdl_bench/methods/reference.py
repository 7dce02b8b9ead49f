"""The posterior itself, by Hamiltonian Monte Carlo: what every other method approximates."""

from __future__ import annotations

import torch

from bdl_bench.methods.registry import POSTERIOR, Method, preset
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import Loader, queries
from bdl_bench.problem.severity import most_severe
from estimators import UncertaintyEstimator
from estimators.errors import DataError, UnsupportedError
from estimators.numerics.pytrees import PyTree, concatenate, select_rows
from estimators.sampling import ReferencePosterior

_CHECK_ROWS = 256
"""The largest number of test rows at which the chains must have converged before sampling ends."""
_OOD_CHECK_ROWS = 128
"""The same for every other set of rows that is compared with the posterior."""

_FLOAT32_WEIGHTS = 1_000
"""Number of weights above which it samples in float32, twice as fast; the criteria are those of float64."""
_MAX_WEIGHTS = 5_000
"""Largest number of weights. A run takes 50,000 to 300,000 gradients over all training rows, and more weights need
more of them: 2,410 weights on digits take minutes."""


def _first_rows(problem: Problem, loader: Loader, n: int) -> PyTree | None:
    """Return rows to judge the chains at; None if their batches cannot be joined, such as texts."""
    try:
        rows = concatenate([query.x for query in queries(loader, problem.layout)])
    except (DataError, RuntimeError):
        return None
    return select_rows(rows, slice(0, n))


def _reference(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.n_parameters > _MAX_WEIGHTS:
        raise UnsupportedError(
            f"a network of at most {_MAX_WEIGHTS:,} weights for {POSTERIOR}",
            received=f"{problem.n_parameters:,} weights",
            remedy="estimators.ReferencePosterior(model, ..., max_gradients=...) with hours of time.",
        )
    unlike = [*problem.ood.values(), *(problem.shifts[name] for name in most_severe(problem.shifts))]
    ood = [_first_rows(problem, loader, _OOD_CHECK_ROWS) for loader in unlike]
    return preset(
        ReferencePosterior,
        seeded=True,
        check_rows=_first_rows(problem, problem.test, _CHECK_ROWS),
        ood_check_rows=[rows for rows in ood if rows is not None],
        dtype=torch.float32 if problem.n_parameters > _FLOAT32_WEIGHTS else None,
    )(problem, seed)


PRESETS = [
    Method(
        POSTERIOR,
        "the posterior of the network itself: Hamiltonian Monte Carlo, with chains that must have converged",
        _reference,
        retrains=False,
    )
]
