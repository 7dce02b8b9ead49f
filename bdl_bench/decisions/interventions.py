"""Interventions: epistemic and aleatoric uncertainty against the number of training rows and the noise of labels.

More rows should lower the epistemic part, and not the aleatoric one. Noisier labels should raise the aleatoric part.
Noise is added to the labels of the largest training set and of the validation rows; the first level of noise is 0,
which is the largest set as it is.

For classes, epistemic is the mutual information between label and function and aleatoric the expected entropy, both
in nats; they add up to the entropy of the prediction (Depeweg et al. 2018). For regression, epistemic is the variance
of the outputs, and aleatoric the noise variance with the largest likelihood of the validation rows, given mean and
epistemic variance of the method (`learned_noise`); both in squared units of the target.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from bdl_bench.decisions.acquisition import check_has_variance, moments
from bdl_bench.decisions.learner import Labelled, Learner
from bdl_bench.metrics.classification import entropy
from bdl_bench.metrics.mutual_information import mutual_information
from bdl_bench.problem.decision import Interventions
from bdl_bench.records.sample_scores import SampleScores
from estimators import UncertaintyEstimator

__all__ = ["interventions", "learned_noise", "with_label_noise"]

Floats = NDArray[np.float64]
_MOST_NOISE = 1e4
"""Largest learned noise variance, in units of the mean squared error."""


def interventions(learner: Learner, decision: Interventions) -> dict[str, Floats]:
    """Return the levels of both interventions, and epistemic and aleatoric uncertainty at each, as means of test rows.

    Args:
        learner: trains the network and fits the method.
        decision: the levels.

    Returns:
        Arrays by name: sizes, size_epistemic and size_aleatoric with one number per size; noise_levels, noise_epistemic
        and noise_aleatoric with one per noise level.

    Raises:
        UnsupportedError: the method has no variance, or cannot sample class probabilities.
    """
    rows, validation = learner.start, Labelled.of(learner.problem.validation)
    test, kind = Labelled.of(learner.problem.test).x, learner.problem.likelihood.kind
    largest = rows[slice(decision.sizes[-1])]
    by_size = [_parts(learner, rows[slice(size)], validation, test) for size in decision.sizes]
    by_noise = [by_size[-1]]  # no noise, the largest set
    for level in decision.label_noise[1:]:
        train, held_out = (
            with_label_noise(part, level, largest, kind, (learner.seed, i))
            for i, part in enumerate((largest, validation))
        )
        by_noise.append(_parts(learner, train, held_out, test))
    found = {"sizes": np.array(decision.sizes, dtype=np.float64), "noise_levels": np.array(decision.label_noise)}
    for name, pairs in (("size", by_size), ("noise", by_noise)):
        epistemic, aleatoric = np.array(pairs).T
        found |= {f"{name}_epistemic": epistemic, f"{name}_aleatoric": aleatoric}
    return found


def _parts(learner: Learner, train: Labelled, validation: Labelled, test: Tensor) -> tuple[float, float]:
    """Return the mean epistemic and aleatoric uncertainty of the test rows of a method fitted on these rows."""
    estimator = learner.fitted(learner.trained_on(train))
    if learner.problem.likelihood.kind != "regression":
        return _of_classes(estimator, test)
    mean, variance = moments(estimator, validation.x)
    noise = learned_noise(validation.y.detach().cpu().double().numpy() - mean, variance)
    epistemic = moments(estimator, test)[1]
    check_has_variance(epistemic)
    shift, unit = (learner.in_target_units(torch.full((1, epistemic.shape[-1]), value)) for value in (0.0, 1.0))
    square = np.square(unit - shift)
    return float((square * epistemic).mean()), float((square * noise).mean())


def _of_classes(estimator: UncertaintyEstimator, test: Tensor) -> tuple[float, float]:
    log_probs = SampleScores(estimator, estimator.predict_uncalibrated).log_probs(test)
    information = mutual_information(log_probs)
    check_has_variance(information)
    return float(information.mean()), float(entropy(log_probs).mean())


def learned_noise(residuals: Floats, variance: Floats) -> float:
    """Return the noise variance s with the largest likelihood, residuals ~ N(0, variance + s).

    It is at least √(2/n) times the mean squared error of n residuals, which is the standard error of the mean squared
    error: less noise cannot be distinguished from none. A method whose epistemic variance exceeds the squared errors is
    at this bound.

    Args:
        residuals: of the validation rows, (M, C).
        variance: epistemic variance there, (M, C).

    Returns:
        The noise variance of all outputs, in squared units of the residuals.
    """
    scale = float(np.square(residuals).mean())

    def loss(log_ratio: float) -> float:
        total = variance + scale * np.exp(log_ratio)
        return float((np.log(total) + np.square(residuals) / total).mean())

    bounds = (0.5 * float(np.log(2 / residuals.size)), float(np.log(_MOST_NOISE)))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return scale * float(np.exp(found.x))


def with_label_noise(rows: Labelled, level: float, train: Labelled, kind: str, seed: tuple[int, int]) -> Labelled:
    """Return rows with noise in their labels; the random numbers of a seed are the same at every level.

    Args:
        rows: whose labels change.
        level: of regression, in standard deviations of the training targets; of classes, the share of labels that are
            drawn at random from all classes.
        train: the training rows, for the standard deviation and the number of classes.
        kind: "regression", "classification" or "binary".
        seed: of the noise, and the number of the set.

    Returns:
        The rows with other targets.
    """
    rng = np.random.default_rng(seed)
    shape = tuple(rows.y.shape)
    if kind == "regression":
        noise = torch.from_numpy(rng.normal(size=shape)).to(rows.y)
        return replace(rows, y=rows.y + level * train.y.std(0) * noise)
    n_classes = 2 if kind == "binary" else int(train.y.max()) + 1
    drawn, changed = rng.integers(n_classes, size=shape), rng.uniform(size=shape) < level
    return replace(
        rows,
        y=torch.where(torch.from_numpy(changed).to(rows.y.device), torch.from_numpy(drawn).to(rows.y), rows.y),
    )
