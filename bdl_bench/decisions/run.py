"""The loop of a problem's decision: its curves, and the problem at its end, where the method is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.decisions.active_learning import active_learning
from bdl_bench.decisions.interventions import interventions
from bdl_bench.decisions.learner import Indices, Learner
from bdl_bench.decisions.optimisation import expected_improvement_queries, greedy_queries, regret
from bdl_bench.problem.decision import ActiveLearning, BayesianOptimisation, Interventions
from bdl_bench.problem.problem import Problem

__all__ = ["Outcome", "run_decision"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Outcome:
    """The result of a loop.

    Args:
        arrays: curves by name, as a record has them under `decision/`.
        problem: without a decision, with the rows that are labelled at the end and a network trained on them.
    """

    arrays: Arrays
    problem: Problem


def run_decision(learner: Learner) -> Outcome:
    """Run the loop of a problem's decision with a method.

    Arrays of active learning: `labels`, the number of labelled rows, (R + 1,); `error`, `nll` and `network_error`
    (`LearningCurve`), each also as `random_<name>`. Of Bayesian optimisation: `labels`, `regret`, `random_regret` and
    `greedy_regret`, (Q + 1,). Both have `queried`, the rows of the pool. Of interventions: see `interventions`.

    Args:
        learner: with the problem and the method.

    Returns:
        The curves, and the problem at the end of the loop.

    Raises:
        UnsupportedError: the method cannot decide, such as one without a variance.
    """
    decision = learner.problem.decision
    if isinstance(decision, ActiveLearning):
        own, random = active_learning(learner, decision)
        curves: Arrays = {"labels": _labels(learner, own.queried, decision.n_per_round)}
        for prefix, curve in (("", own), ("random_", random)):
            curves |= {f"{prefix}{name}": getattr(curve, name) for name in ("error", "nll", "network_error")}
        return Outcome(curves | {"queried": np.array(own.queried)}, own.problem)
    if isinstance(decision, BayesianOptimisation):
        queried = expected_improvement_queries(learner, decision)
        random_rows = learner.random_order()[: decision.n_queries]
        curves = {
            "labels": _labels(learner, queried, 1),
            "regret": regret(learner, queried, decision),
            "random_regret": regret(learner, random_rows, decision),
            "greedy_regret": regret(learner, greedy_queries(learner, decision), decision),
            "queried": np.array(queried),
        }
        return Outcome(curves, learner.with_queried(queried))
    assert isinstance(decision, Interventions)
    problem = learner.problem
    return Outcome(dict(interventions(learner, decision)), problem.without_decision(problem.model, problem.train))


def _labels(learner: Learner, queried: Indices, step: int) -> NDArray[np.float64]:
    n = len(learner.start)
    return np.arange(n, n + len(queried) + 1, step, dtype=np.float64)
