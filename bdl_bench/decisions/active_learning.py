"""Pool-based active learning: the learning curve of a method with its own queries, and with random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bdl_bench.decisions.acquisition import (
    check_has_variance,
    sample_rows_by_score,
    top_rows,
    uncertainty_scores,
)
from bdl_bench.decisions.learner import Indices, Learner
from bdl_bench.problem.decision import ActiveLearning
from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator

__all__ = ["LearningCurve", "active_learning"]

Floats = NDArray[np.float64]
Choice: TypeAlias = Callable[[UncertaintyEstimator, Indices], Indices]
"""Function of the fitted method and of the rows queried so far that returns the rows to query next."""


@dataclass(frozen=True)
class LearningCurve:
    """Scores of the test rows at the start and after each round.

    Args:
        queried: rows of the pool in the order of their queries.
        error: RMSE or error rate of the method, (R + 1,).
        nll: of the method, (R + 1,).
        network_error: RMSE or error rate of the trained network alone, (R + 1,).
        problem: with the network that is trained on all labelled rows.
    """

    queried: Indices
    error: Floats
    nll: Floats
    network_error: Floats
    problem: Problem


def active_learning(learner: Learner, decision: ActiveLearning) -> tuple[LearningCurve, LearningCurve]:
    """Return the learning curve of a method with its own queries, and with random queries.

    The method predicts the test rows with all labels so far. The random rows depend on the seed alone.

    Args:
        learner: trains the network and fits the method.
        decision: rounds, rows per round and acquisition.

    Returns:
        Both curves.

    Raises:
        UnsupportedError: the method has no variance, or no samples.
    """
    pool, n = learner.pool, decision.n_per_round
    assert pool is not None
    order = learner.random_order()

    def by_scores(estimator: UncertaintyEstimator, queried: Indices) -> Indices:
        scores = uncertainty_scores(estimator, pool.x, decision.acquisition)
        check_has_variance(scores)
        if decision.batch == "top":
            return top_rows(scores, queried, n)
        return sample_rows_by_score(scores, queried, n, (learner.seed, len(queried), 1))

    def at_random(estimator: UncertaintyEstimator, queried: Indices) -> Indices:  # noqa: ARG001
        return order[len(queried) : len(queried) + n]

    own = _curve(learner, decision.n_rounds, by_scores)
    return own, _curve(learner, decision.n_rounds, at_random, shared=True)


def _curve(learner: Learner, n_rounds: int, choose: Choice, *, shared: bool = False) -> LearningCurve:
    queried: Indices = ()
    scores: list[tuple[float, float, float]] = []
    for number in range(n_rounds + 1):
        problem = learner.with_queried(queried, shared=shared)
        estimator = learner.fitted(problem)
        scores.append((*learner.scores(problem, estimator), learner.scores(problem, learner.network(problem))[0]))
        if number < n_rounds:
            queried += choose(estimator, queried)
    error, nll, network_error = np.array(scores).T
    return LearningCurve(queried, error, nll, network_error, problem)
