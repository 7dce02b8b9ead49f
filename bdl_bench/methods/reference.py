"""The posterior itself, by Hamiltonian Monte Carlo: what every other method approximates."""

from __future__ import annotations

from bdl_bench.methods.registry import POSTERIOR, Method, preset
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import queries
from estimators import UncertaintyEstimator
from estimators.errors import DataError
from estimators.numerics.pytrees import PyTree, concatenate, select_rows
from estimators.sampling import ReferencePosterior

_CHECK_ROWS = 256
"""The largest number of test rows at which the chains must have converged before sampling ends."""


def _test_rows(problem: Problem) -> PyTree | None:
    """Return test rows to judge the chains at; None if their batches cannot be joined, such as texts."""
    try:
        rows = concatenate([query.x for query in queries(problem.test, problem.layout)])
    except (DataError, RuntimeError):
        return None
    return select_rows(rows, slice(0, _CHECK_ROWS))


def _reference(problem: Problem, seed: int) -> UncertaintyEstimator:
    return preset(ReferencePosterior, seeded=True, check_rows=_test_rows(problem))(problem, seed)


PRESETS = [
    Method(
        POSTERIOR,
        "the posterior of the network itself: Hamiltonian Monte Carlo, with chains that must have converged",
        _reference,
        retrains=False,
    )
]
