"""Training of the network and fits of a method on the rows that are labelled so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bdl_bench.methods.custom_methods import as_estimator
from bdl_bench.methods.registry import Build
from bdl_bench.metrics import METRICS
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import Loader, rows
from bdl_bench.records.predictions import Predictor
from bdl_bench.records.target_units import in_target_units
from estimators import UncertaintyEstimator
from estimators.baselines.map import MAP
from estimators.runtime.rng import seeded
from estimators.training.training import train_map

__all__ = ["Indices", "Labelled", "Learner", "Networks"]

Indices: TypeAlias = tuple[int, ...]
Floats = NDArray[np.float64]
Networks: TypeAlias = dict[Indices, dict[str, Tensor]]
"""Weights and buffers of the networks that all methods train on the same rows, by the rows of the pool."""

_BATCH = 1000
"""Rows per batch of loaders that are made here. The recipe regroups the rows of training."""


@dataclass(frozen=True)
class Labelled:
    """Rows with their targets, in memory.

    Args:
        x: inputs, (N, ...).
        y: targets, (N, ...).
    """

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, loader: Loader) -> Labelled:
        """Return all rows of a loader, in its order."""
        batches = list(rows(loader))
        return cls(torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Indices | slice) -> Labelled:
        chosen = index if isinstance(index, slice) else torch.tensor(index, dtype=torch.long, device=self.x.device)
        return Labelled(self.x[chosen], self.y[chosen])

    def followed_by(self, other: Labelled) -> Labelled:
        """Return these rows, then the other ones."""
        return Labelled(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the rows as a loader."""
        return list(zip(self.x.split(_BATCH), self.y.split(_BATCH), strict=True))


@dataclass
class Learner:
    """Trains the network of a problem on other rows, and fits a method there, as at every other problem.

    Each training starts from the initial weights of the seed and uses the recipe of the problem.

    Args:
        problem: the problem, whose network is trained on the rows at the start.
        build: function of a problem and a seed that returns an estimator that is not fitted.
        seed: of initial weights, training and method.
        networks: where the weights of networks are kept that other methods need, too.
    """

    problem: Problem
    build: Build
    seed: int
    networks: Networks = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = Labelled.of(self.problem.train)
        self.pool = None if self.problem.pool is None else Labelled.of(self.problem.pool)

    def with_queried(self, queried: Indices, *, shared: bool = False) -> Problem:
        """Return the problem after these rows of the pool were labelled, in this order.

        Args:
            queried: indices of rows of the pool.
            shared: whether other methods query the same rows, so that the network is kept for them.

        Returns:
            A problem without a decision, whose network is trained on all labelled rows.
        """
        assert self.pool is not None
        if not queried:  # trained already
            return self.problem.without_decision(self.problem.model, self.start.batches())
        train = self.start.followed_by(self.pool[queried])
        if not shared:
            return self.trained_on(train)
        if queried not in self.networks:
            self.networks[queried] = self.trained_on(train).model.state_dict()
        model = self._untrained()
        model.load_state_dict(self.networks[queried])
        return self.problem.without_decision(model.eval(), train.batches())

    def trained_on(self, train: Labelled) -> Problem:
        """Train the network on these rows.

        Args:
            train: the labelled rows, in the order in which the trainer gets them.

        Returns:
            The problem with that network and these training rows, without a decision.
        """
        problem, model, batches = self.problem, self._untrained(), train.batches()
        assert problem.recipe is not None
        with seeded(self.seed):
            train_map(
                model,
                problem.likelihood,
                batches,
                prior_precision=problem.prior_precision,
                recipe=problem.recipe,
                seed=self.seed,
            )
        return problem.without_decision(model, batches)

    def fitted(self, problem: Problem) -> UncertaintyEstimator:
        """Fit the method.

        Args:
            problem: of `with_queried` or `trained_on`.

        Returns:
            The method, fitted on the training rows of that problem.
        """
        with seeded(self.seed):
            return as_estimator(self.build(problem, self.seed), problem).fit(problem.train)

    def network(self, problem: Problem) -> UncertaintyEstimator:
        """Return the trained network alone.

        Args:
            problem: of `with_queried` or `trained_on`.

        Returns:
            The network as an estimator without epistemic variance.
        """
        estimator = MAP(problem.model, problem.likelihood, prior_precision=problem.prior_precision)
        return estimator.fit(problem.train)

    def scores(self, problem: Problem, estimator: UncertaintyEstimator) -> tuple[float, float]:
        """Score the predictions of the test rows.

        Args:
            problem: of `with_queried` or `trained_on`.
            estimator: fitted there.

        Returns:
            RMSE in the unit of the target, or the error rate of classes; and NLL in nats.
        """
        arrays = Predictor(problem, estimator, estimator.predict_uncalibrated).test()
        found = {metric.key: metric for metric in METRICS[problem.likelihood.kind]}
        if problem.likelihood.kind == "regression":
            return found["reg/RMSE"].value(arrays), found["reg/NLL"].value(arrays)
        return 1 - found["cls/Acc"].value(arrays), found["cls/NLL"].value(arrays)

    def in_target_units(self, y: Tensor) -> Floats:
        """Convert targets of a regression to their original unit.

        Args:
            y: targets in the unit of the network's outputs, (N, C).

        Returns:
            The targets, (N, C).
        """
        values = y.detach().cpu().double().numpy()
        return in_target_units({"targets": values}, self.problem.likelihood)["targets"]

    def random_order(self) -> Indices:
        """Return all rows of the pool in the order of random queries, which depends on the seed alone."""
        assert self.pool is not None
        return tuple(int(i) for i in np.random.default_rng(self.seed).permutation(len(self.pool)))

    def _untrained(self) -> nn.Module:
        assert self.problem.make_model is not None
        with seeded(self.seed):
            model = self.problem.make_model()
        device = next(self.problem.model.parameters()).device
        return model.to(device)
