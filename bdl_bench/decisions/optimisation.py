"""Bayesian optimisation on a pool: the regret of a method by expected improvement, of random and of greedy queries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.decisions.acquisition import check_has_variance, log_expected_improvement, moments, top_rows
from bdl_bench.decisions.learner import Indices, Learner
from bdl_bench.problem.decision import BayesianOptimisation
from estimators.errors import UnsupportedError

__all__ = ["expected_improvement_queries", "greedy_queries", "regret"]

Floats = NDArray[np.float64]


def regret(learner: Learner, queried: Indices, decision: BayesianOptimisation) -> Floats:
    """Return the best target of all rows minus the best one found, at the start and after each query.

    Args:
        learner: with the rows at the start and the pool.
        queried: rows of the pool in the order of their queries.
        decision: which direction is better.

    Returns:
        The regret in the unit of the target, (Q + 1,), not negative.
    """
    assert learner.pool is not None
    sign = 1 if decision.maximise else -1
    start, pool = (sign * learner.in_target_units(rows.y)[:, 0] for rows in (learner.start, learner.pool))
    found = np.maximum.accumulate(np.concatenate([[start.max()], pool[list(queried)]]))
    best: Floats = max(start.max(), pool.max()) - found
    return best


def expected_improvement_queries(learner: Learner, decision: BayesianOptimisation) -> Indices:
    """Return the rows that a method queries by expected improvement over the best label so far.

    Mean and epistemic variance are those of the method. The noise of a label is not part of the improvement.

    Raises:
        UnsupportedError: the method has no variance.
    """

    def scores(queried: Indices, best: float) -> Floats:
        mean, variance = moments(learner.fitted(learner.with_queried(queried)), _pool(learner))
        check_has_variance(variance)
        return log_expected_improvement(_sign(decision) * mean[:, 0], variance[:, 0], best)

    return _queries(learner, decision, scores)


def greedy_queries(learner: Learner, decision: BayesianOptimisation) -> Indices:
    """Return the rows with the best mean of the trained network, which are the same for every method."""

    def scores(queried: Indices, best: float) -> Floats:  # noqa: ARG001
        problem = learner.with_queried(queried, shared=True)
        return _sign(decision) * moments(learner.network(problem), _pool(learner))[0][:, 0]

    return _queries(learner, decision, scores)


def _queries(learner: Learner, decision: BayesianOptimisation, scores: Callable[[Indices, float], Floats]) -> Indices:
    """Query the row with the highest score, again and again. `scores` has the rows so far and the best label."""
    assert learner.pool is not None
    if learner.pool.y.ndim != 2 or learner.pool.y.shape[1] != 1:
        raise UnsupportedError(
            "one target, which is optimised",
            received=f"targets of shape {tuple(learner.pool.y.shape)}",
            remedy="a regression with y (N, 1).",
        )
    queried: Indices = ()
    labels = _sign(decision) * learner.start.followed_by(learner.pool).y[:, 0].detach().cpu().double().numpy()
    n_start = len(learner.start)
    for _ in range(decision.n_queries):
        best = labels[[*range(n_start), *(n_start + i for i in queried)]].max()
        queried += top_rows(scores(queried, float(best)), queried, 1)
    return queried


def _sign(decision: BayesianOptimisation) -> int:
    return 1 if decision.maximise else -1


def _pool(learner: Learner) -> Tensor:
    assert learner.pool is not None
    return learner.pool.x
