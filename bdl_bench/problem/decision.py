"""Decisions that a method makes with its variance: which rows to label, and what to try next; and interventions.

A problem with a decision is evaluated by a loop of trainings instead of one; `bdl_bench.decisions` has the loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Literal, TypeAlias, get_args

from estimators.errors import OptionError
from estimators.option_checks import checked_choice, checked_integer

__all__ = [
    "Acquisition",
    "ActiveLearning",
    "Batch",
    "BayesianOptimisation",
    "Decision",
    "Interventions",
    "check_decision",
]

Acquisition = Literal["variance", "mutual_information"]
Batch = Literal["top", "power"]


@dataclass(frozen=True)
class ActiveLearning:
    """Pool-based active learning: in each round the rows of the pool with the highest scores are labelled.

    The training rows of the problem are the labelled rows at the start. In each round the network is trained anew on
    all labelled rows and the method is fitted. Beside it, the same method learns from rows that are drawn at random.

    Args:
        n_rounds: rounds of queries.
        n_per_round: rows that are labelled in each round.
        acquisition: "variance", the epistemic variance of the outputs (mean over outputs), or "mutual_information"
            between label and function (BALD, Houlsby et al. 2011), for classes and binary outputs.
        batch: how the rows of a round are chosen by their scores: "top", the highest ones, which are often alike; or
            "power", drawn without replacement with probabilities proportional to the scores (Kirsch et al. 2023,
            "Stochastic batch acquisition", with β = 1).

    Raises:
        OptionError: for an option out of its range.

    Example:
        >>> ActiveLearning(n_rounds=3, n_per_round=5).n_queries
        15
    """

    n_rounds: int = 10
    n_per_round: int = 10
    acquisition: Acquisition = "variance"
    batch: Batch = "top"

    def __post_init__(self) -> None:
        checked_integer("n_rounds", self.n_rounds, at_least=1)
        checked_integer("n_per_round", self.n_per_round, at_least=1)
        if self.acquisition not in get_args(Acquisition):
            raise OptionError(
                f"an acquisition among {', '.join(get_args(Acquisition))}",
                received=repr(self.acquisition),
                remedy="random queries are run beside every method; they need no option.",
            )
        checked_choice("batch", self.batch, get_args(Batch))

    @property
    def n_queries(self) -> int:
        """The number of rows that are labelled in all rounds."""
        return self.n_rounds * self.n_per_round


@dataclass(frozen=True)
class BayesianOptimisation:
    """Search for the row of a pool with the largest target, one query at a time, by expected improvement.

    The training rows of the problem are the labelled rows at the start. Beside the method, two other searches are
    run: rows drawn at random, and the row with the best mean of the trained network ("greedy").

    Args:
        n_queries: rows that are labelled, one after the other.
        maximise: whether the largest target is wanted, not the smallest.

    Raises:
        OptionError: for an option out of its range.

    Example:
        >>> BayesianOptimisation(n_queries=5)
        BayesianOptimisation(n_queries=5, maximise=True)
    """

    n_queries: int = 30
    maximise: bool = True

    def __post_init__(self) -> None:
        checked_integer("n_queries", self.n_queries, at_least=1)


@dataclass(frozen=True)
class Interventions:
    """Changes of the training set that should change one part of the uncertainty and leave the other.

    With more training rows the epistemic part must fall and the aleatoric part must not; with more noise in the labels
    the aleatoric part must rise and the epistemic part must not. Each level trains the network anew.

    Args:
        sizes: numbers of training rows, ascending; each set contains the smaller ones.
        label_noise: levels of the noise in the labels of all training and validation rows, ascending from 0. For
            regression, in standard deviations of the training targets; for classes, the share of labels that are drawn
            at random.

    Raises:
        OptionError: for levels that do not ascend, or are out of their range.

    Example:
        >>> Interventions(sizes=(50, 200), label_noise=(0.0, 0.5)).sizes
        (50, 200)
    """

    sizes: Sequence[int] = (50, 100, 200, 400)
    label_noise: Sequence[float] = (0.0, 0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "label_noise", tuple(self.label_noise))
        for size in self.sizes:
            checked_integer("sizes", size, at_least=1)
        if len(self.sizes) < 2 or not _ascends(self.sizes):
            raise OptionError(
                "at least two ascending sizes", received=repr(self.sizes), remedy="such as (50, 100, 200)."
            )
        if len(self.label_noise) < 2 or self.label_noise[0] != 0 or not _ascends(self.label_noise):
            raise OptionError(
                "at least two ascending levels of label_noise, the first of them 0",
                received=repr(self.label_noise),
                remedy="such as (0.0, 0.5, 1.0).",
            )


Decision: TypeAlias = ActiveLearning | BayesianOptimisation | Interventions


def _ascends(levels: Sequence[float]) -> bool:
    return all(isfinite(level) for level in levels) and all(a < b for a, b in pairwise(levels))


def check_decision(decision: Decision, kind: str, *, n_train: int, n_pool: int | None) -> None:
    """Check that a decision fits the kind of the likelihood and the numbers of rows. Raises OptionError.

    Args:
        decision: the decision.
        kind: "regression", "classification" or "binary".
        n_train: number of training rows.
        n_pool: number of rows in the pool; None if there is no pool.
    """
    if isinstance(decision, Interventions):
        _check_interventions(decision, kind, n_train, n_pool)
        return
    if n_pool is None or n_pool < decision.n_queries:
        raise OptionError(
            f"a pool of at least {decision.n_queries} rows, as many as are queried",
            received="no pool" if n_pool is None else f"one of {n_pool} rows",
            remedy="pass pool=, a loader of (x, y), or query fewer rows.",
        )
    if isinstance(decision, BayesianOptimisation) and kind != "regression":
        raise OptionError(
            "a regression, whose target is optimised",
            received=f"a likelihood of kind {kind!r}",
            remedy="ActiveLearning.",
        )
    if isinstance(decision, ActiveLearning) and (decision.acquisition == "variance") != (kind == "regression"):
        raise OptionError(
            'acquisition="variance" for regression, "mutual_information" for classes and binary outputs',
            received=f"{decision.acquisition!r} for {kind}",
            remedy="the other one: for a Gaussian with one σ, mutual information has the order of the variance; the "
            "variance of logits is large where the probabilities no longer change.",
        )


def _check_interventions(decision: Interventions, kind: str, n_train: int, n_pool: int | None) -> None:
    if n_pool is not None:
        raise OptionError("no pool for Interventions", received=f"one of {n_pool} rows", remedy="omit pool.")
    if decision.sizes[-1] > n_train:
        raise OptionError(
            f"sizes of at most {n_train}, the number of training rows",
            received=repr(decision.sizes),
            remedy="smaller sizes.",
        )
    if kind != "regression" and decision.label_noise[-1] > 1:
        raise OptionError(
            "label_noise of at most 1 for classes, a share of the labels",
            received=repr(decision.label_noise),
            remedy="such as (0.0, 0.2, 0.4).",
        )
