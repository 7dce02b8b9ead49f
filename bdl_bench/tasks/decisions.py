"""Decisions on concrete and digits: active learning, Bayesian optimisation, and interventions on the training set.

Sources: concrete as in `tables`, digits as in `scikit_learn`. Rows are drawn by the seed.
- concrete-active-learning: 20 labelled rows, a pool of 685, 100 validate and 200 test; ten rounds of ten rows by the
  epistemic variance.
- digits-active-learning: 20 labelled images, a pool of 1000, 277 validate and 500 test; ten rounds of ten images by
  the mutual information between label and function (BALD).
- concrete-active-learning-power, digits-active-learning-power: the same, but the ten rows of a round are drawn in
  proportion to their scores, since the ten highest ones are often alike.
- concrete-optimisation: 10 labelled rows, a pool of 795, 100 validate and 100 test; 30 queries by expected improvement
  for the largest strength. The error of the test rows is that of the network with 40 labels.
- concrete-interventions: 50, 100, 200, 400 of 400 training rows, 205 validate and 400 test; noise of 0, ¼, ½ and 1
  standard deviations of the target in the labels of 400 training rows.
- digits-interventions: 50, 100, 200, 400 of 400 training images, 397 validate and 1000 test; 0, 10 %, 20 % and 40 % of
  the labels drawn at random.
Scale: inputs of concrete are standardised by the labelled rows and the pool, whose inputs are known; the target by the
labelled rows alone.
Models: 8-50-1 with ReLU (501 parameters), σ = 0.3; 64-32-10 with tanh (2410 parameters); float64. Prior precision
δ = 1, fixed, not tuned. Recipe: Adam, 100 epochs of batches of 128, learning rate 0.01, cosine, from the same initial
weights in every round. With 120 random labels of concrete the RMSE is that of 100 epochs of batches of 32, 8.9 and 8.7
MPa (mean of three seeds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bdl_bench.data.uci import shipped_table
from bdl_bench.networks.small import mlp, relu_mlp
from bdl_bench.problem.decision import ActiveLearning, BayesianOptimisation, Decision, Interventions
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import Indices, loader, standardised
from estimators.likelihoods import Gaussian, Likelihood
from estimators.training.training import Recipe

__all__ = ["concrete_decision", "digits_decision"]

_SIGMA, _EPOCHS = 0.3, 100
_LEARNING = ActiveLearning(n_rounds=10, n_per_round=10)
_BALD = ActiveLearning(n_rounds=10, n_per_round=10, acquisition="mutual_information")
_POWER = replace(_LEARNING, batch="power")
_BALD_POWER = replace(_BALD, batch="power")
_SEARCH = BayesianOptimisation(n_queries=30)
_NOISE = Interventions(sizes=(50, 100, 200, 400), label_noise=(0.0, 0.25, 0.5, 1.0))
_RANDOM_LABELS = Interventions(sizes=(50, 100, 200, 400), label_noise=(0.0, 0.1, 0.2, 0.4))


def concrete_decision(seed: int, *, sizes: Sequence[int], decision: Decision) -> Problem:
    """Return a decision on the strength of concrete.

    Args:
        seed: of the split and the initial weights.
        sizes: numbers of labelled rows at the start, of validation and of test rows; a decision with a pool has the
            others in it.
        decision: the decision.

    Returns:
        The problem; predictions are in MPa.
    """
    columns = shipped_table("concrete")
    parts = _parts(len(columns.target), sizes, seed)
    known = np.concatenate([parts[0], parts[3]]) if not isinstance(decision, Interventions) else parts[0]
    x, y = standardised(columns.inputs, known), standardised(columns.target, parts[0])
    target = columns.target[parts[0]]
    likelihood = Gaussian(_SIGMA, target_shift=float(target.mean()), target_scale=float(target.std()))
    return _problem(x, y, parts, decision, likelihood, partial(relu_mlp, 8, 50, 1))


def digits_decision(seed: int, *, sizes: Sequence[int], decision: Decision) -> Problem:
    """Return a decision on images of digits.

    Args:
        seed: of the split and the initial weights.
        sizes: as for `concrete_decision`.
        decision: the decision.

    Returns:
        The problem.
    """
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    parts = _parts(len(labels), sizes, seed)
    return _problem(images.double() / 16, labels.long(), parts, decision, "classification", _digits_network)


def _digits_network() -> nn.Module:
    return mlp(64, 32, 10).double().train()


def _parts(n: int, sizes: Sequence[int], seed: int) -> tuple[Indices, ...]:
    """Return indices of the labelled rows at the start, of validation and test rows, and of the others."""
    start, validation, test, others = np.split(np.random.default_rng(seed).permutation(n), np.cumsum(sizes))
    return start, validation, test, others


def _problem(
    x: Tensor,
    y: Tensor,
    parts: tuple[Indices, ...],
    decision: Decision,
    likelihood: str | Likelihood,
    network: Callable[[], nn.Module],
) -> Problem:
    *split, others = (loader(x[i], y[i], batch_size=1000) for i in parts)
    return Problem(
        network(),
        likelihood,
        *split,
        prior_precision=1.0,
        recipe=Recipe(epochs=_EPOCHS, batch_size=128, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=network,
        pool=None if isinstance(decision, Interventions) else others,
        decision=decision,
    )


_CONCRETE, _DIGITS = "Regression: strength of concrete (MPa)", "Classification: images of digits"

register(
    "concrete-active-learning",
    summary=f"{_CONCRETE}; active learning by the epistemic variance, 20 to 120 labels, MLP 8-50-1",
)(partial(concrete_decision, sizes=(20, 100, 200), decision=_LEARNING))
register(
    "digits-active-learning",
    summary=f"{_DIGITS}; active learning by mutual information (BALD), 20 to 120 labels, MLP 64-32-10",
)(partial(digits_decision, sizes=(20, 277, 500), decision=_BALD))
register(
    "concrete-active-learning-power",
    summary=f"{_CONCRETE}; active learning, rows drawn in proportion to the epistemic variance, MLP 8-50-1",
)(partial(concrete_decision, sizes=(20, 100, 200), decision=_POWER))
register(
    "digits-active-learning-power",
    summary=f"{_DIGITS}; active learning, rows drawn in proportion to the mutual information, MLP 64-32-10",
)(partial(digits_decision, sizes=(20, 277, 500), decision=_BALD_POWER))
register(
    "concrete-optimisation",
    summary=f"{_CONCRETE}; search for the strongest mixture by expected improvement, 10 to 40 labels, MLP 8-50-1",
)(partial(concrete_decision, sizes=(10, 100, 100), decision=_SEARCH))
register(
    "concrete-interventions",
    summary=f"{_CONCRETE}; both parts of the variance with more rows and with noise in the labels, MLP 8-50-1",
)(partial(concrete_decision, sizes=(400, 205, 400), decision=_NOISE))
register(
    "digits-interventions",
    summary=f"{_DIGITS}; both parts of the entropy with more images and with random labels, MLP 64-32-10",
)(partial(digits_decision, sizes=(400, 397, 1000), decision=_RANDOM_LABELS))
