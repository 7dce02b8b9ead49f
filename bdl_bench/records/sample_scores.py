"""Scores of each row that need samples of the function, or its covariance between outputs and rows.

A record keeps one number per row, not the samples: `joint_nll` of the test rows, `mutual_information` of the test and
out-of-distribution rows, and `energy_score` of test rows with several outputs. Sources, in this order:

1. the members of a method whose posterior is a set of functions (`Prediction.samples`), each with equal weight;
2. the Gaussian with the covariance between outputs, and between rows for pairs: exact in regression, and `N_SAMPLES`
   samples from random numbers that are the same for every method for classes;
3. `N_SAMPLES` function samples of the estimator.

A method without any of them has none of these scores: its variances alone do not determine them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.metrics.joint import anchor_counts, joint_nll_of_gaussian, joint_nll_of_samples
from bdl_bench.metrics.log_space import log_sigmoid, log_softmax
from bdl_bench.metrics.mutual_information import mutual_information
from bdl_bench.metrics.regression import energy_score
from bdl_bench.problem.queries import Query
from estimators import UncertaintyEstimator
from estimators.calibration.calibration import Calibration
from estimators.errors import TooLargeError, UnsupportedError
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.pytrees import PyTree, select_rows

__all__ = ["N_SAMPLES", "SampleScores"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

N_SAMPLES = 500
"""Function samples of a posterior that has any number of them. The Monte-Carlo error of the joint NLL of a Laplace
posterior on digits is then below 0.01 nats per label."""
_ENERGY_SAMPLES = 200
"""Samples of the target for the energy score, which forms all pairs."""
_CHUNK = 64
"""Most rows that are paired with each other in a ring."""
_WINDOW = 16
"""Pairs whose covariance is taken from one joint covariance, whose cost per pair grows with their number."""
_ABSENT = (TooLargeError, UnsupportedError)


@dataclass(frozen=True)
class SampleScores:
    """Computes the scores of a fitted method; `calibration` is that of the tuned estimator, None for the untuned one.

    Args:
        estimator: the fitted estimator.
        predict: its predictive distribution, calibrated if `calibration` is given.
        calibration: scale of the variance, and temperature or noise.
    """

    estimator: UncertaintyEstimator
    predict: Callable[[PyTree], Prediction]
    calibration: Calibration | None = None

    def of_batch(self, query: Query, *, joint: bool) -> dict[str, Floats]:
        """Return the scores of the rows of one batch by name, in their order; none if the method has no samples.

        Args:
            query: a batch of inputs, with or without targets.
            joint: whether to compute the scores that need targets, as for test rows.

        Returns:
            Arrays (M,), for Bernoulli outputs `mutual_information` (M, C).
        """
        try:
            prediction = self.predict(query.x)
            if prediction.mean.ndim > 2:  # several positions per row
                return {}
            if prediction.kind == "regression":
                return self._of_regression(query, prediction) if joint and query.y is not None else {}
            if joint and query.y is not None:
                return self._of_classes(query, prediction)
            return {"mutual_information": self._mutual_information(query.x, prediction)}
        except _ABSENT:
            return {}

    def log_probs(self, x: PyTree) -> Floats:
        """Return log-probabilities of the classes by function samples, of each row alone.

        Args:
            x: inputs of M rows.

        Returns:
            (S, M, C), for Bernoulli outputs (S, M, C, 2).

        Raises:
            UnsupportedError, TooLargeError: the method has no samples.
        """
        return self._log_probs_of(x, self.predict(x))

    def _log_probs_of(self, x: PyTree, prediction: Prediction) -> Floats:
        samples = self._members(prediction)
        if samples is None:
            samples = self._independent_rows(x, prediction)
        return _log_probs(samples, prediction.kind)

    def _mutual_information(self, x: PyTree, prediction: Prediction) -> Floats:
        return mutual_information(self._log_probs_of(x, prediction))

    def _of_classes(self, query: Query, prediction: Prediction) -> dict[str, Floats]:
        """Return joint NLL and mutual information of rows with targets, from the same samples."""
        assert query.y is not None
        targets, members = _array(query.y), self._members(prediction)
        scores, information = np.empty(len(query)), np.empty(targets.shape)
        for pairs in _pairs(len(query)):
            first = pairs.rows[:, 0]
            samples = pairs.samples(query.x, self, prediction) if members is None else members[:, pairs.rows]
            log_likelihood = _log_likelihood(samples, targets[pairs.rows], prediction.kind)
            scores[first] = joint_nll_of_samples(log_likelihood, pairs.counts)
            information[first] = mutual_information(_log_probs(samples[:, :, 0], prediction.kind))
        return {"mutual_information": information, "joint_nll": scores}

    def _of_regression(self, query: Query, prediction: Prediction) -> dict[str, Floats]:
        assert query.y is not None
        assert prediction.aleatoric_variance is not None
        noise, mean, targets = (_array(t) for t in (prediction.aleatoric_variance, prediction.mean, query.y))
        scores = np.empty(len(query))
        for pairs in _pairs(len(query)):
            covariance = pairs.covariance(query.x, self, prediction)
            m, sigma2, y = (array[pairs.rows] for array in (mean, noise, targets))
            scores[pairs.rows[:, 0]] = joint_nll_of_gaussian(m, covariance, sigma2, y, pairs.counts)
        found = {"joint_nll": scores}
        if mean.shape[-1] > 1:
            samples = self._independent_rows(query.x, prediction, n_samples=_ENERGY_SAMPLES)
            rng = np.random.default_rng(1)
            found["energy_score"] = energy_score(samples + np.sqrt(noise) * rng.normal(size=samples.shape), targets)
        return found

    def _members(self, prediction: Prediction) -> Floats | None:
        """Return the outputs of the members (S, M, C), calibrated; None if the prediction has none."""
        if prediction.samples is None or len(prediction.samples) < 2:
            return None
        return _array(prediction.samples)

    def _independent_rows(self, x: PyTree, prediction: Prediction, n_samples: int = N_SAMPLES) -> Floats:
        """Return samples (S, M, C) of the outputs of each row, with the covariance between outputs."""
        try:
            covariance = _array(self.estimator.covariance(x))
        except _ABSENT:
            return self.calibrated_samples(x, prediction, n_samples)
        return self.gaussian_samples(_array(prediction.mean), covariance, prediction, n_samples)

    def calibrated_samples(self, x: PyTree, prediction: Prediction, n_samples: int = N_SAMPLES) -> Floats:
        """Return function samples of the estimator with the variance scale and the temperature of the calibration."""
        samples = _array(self.estimator.sample(x, n_samples))
        mean = self._temperature(prediction.kind) * _array(prediction.mean)
        spread: Floats = (mean + np.sqrt(self._variance_scale) * (samples - mean)) / self._temperature(prediction.kind)
        return spread

    def gaussian_samples(self, mean: Floats, covariance: Floats, prediction: Prediction, n_samples: int) -> Floats:
        """Return samples (S, G, D) of N(mean, covariance) with calibrated covariances, (G, D) and (G, D, D)."""
        scaled = covariance * (self._variance_scale / self._temperature(prediction.kind) ** 2)
        values, vectors = np.linalg.eigh(scaled)
        # The symmetric root S = V √D Vᵀ, S S = Σ: unlike V √D it does not depend on the signs of the eigenvectors.
        root = (vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]) @ vectors.swapaxes(-1, -2)
        normal = np.random.default_rng(0).normal(size=(n_samples, *mean.shape))
        samples: Floats = mean + np.einsum("gde,sge->sgd", root, normal)
        return samples

    def scaled_covariance(self, covariance: Floats, prediction: Prediction) -> Floats:
        """Return a covariance of the function with the variance scale and the temperature of the calibration."""
        return covariance * (self._variance_scale / self._temperature(prediction.kind) ** 2)

    @property
    def _variance_scale(self) -> float:
        return 1.0 if self.calibration is None else self.calibration.variance_scale

    def _temperature(self, kind: str) -> float:
        """Return the temperature by which logits are divided; 1 in regression, whose second number is a noise."""
        return 1.0 if self.calibration is None or kind == "regression" else self.calibration.noise_or_temperature


@dataclass(frozen=True)
class _Pairs:
    """Pairs of anchor rows: each row of `order` with the next one, the last with the first.

    Args:
        order: the rows of the pairs, (n,).
        counts: repetitions of both anchors, (n, 2).
    """

    order: Integers
    counts: Integers

    @property
    def rows(self) -> Integers:
        """Return both rows of each pair, (n, 2)."""
        return np.stack([self.order, np.roll(self.order, -1)], axis=-1)

    def covariance(self, x: PyTree, scores: SampleScores, prediction: Prediction) -> Floats:
        """Return the covariance between all outputs of both rows of each pair, (n, 2, C, 2, C)."""
        members = scores._members(prediction)
        if members is not None:
            return _moments(members[:, self.rows])
        try:
            return scores.scaled_covariance(self._uncalibrated_covariance(x, scores), prediction)
        except _ABSENT:
            own = scores.calibrated_samples(x, prediction)
            return _moments(own[:, self.rows])

    def samples(self, x: PyTree, scores: SampleScores, prediction: Prediction) -> Floats:
        """Return samples of the outputs of both rows of each pair, jointly, (S, n, 2, C)."""
        mean = _array(prediction.mean)[self.rows]
        n, size = len(self.order), mean.shape[1] * mean.shape[2]
        try:
            joint = self._uncalibrated_covariance(x, scores).reshape(n, size, size)
        except _ABSENT:
            return scores.calibrated_samples(x, prediction)[:, self.rows]
        drawn = scores.gaussian_samples(mean.reshape(n, size), joint, prediction, N_SAMPLES)
        return drawn.reshape(N_SAMPLES, n, *mean.shape[1:])

    def _uncalibrated_covariance(self, x: PyTree, scores: SampleScores) -> Floats:
        """Return the covariance of the estimator between both rows of each pair, (n, 2, C, 2, C)."""
        n, parts = len(self.order), []
        for start in range(0, n, _WINDOW):
            stop = min(start + _WINDOW, n)
            rows = self.order[np.arange(start, stop + 1) % n]  # the first row of each pair, and the second of the last
            between = _array(scores.estimator.joint_covariance(select_rows(x, torch.from_numpy(rows))))
            local = np.arange(stop - start)[:, None] + np.arange(2)
            parts.append(between[local[:, :, None], :, local[:, None, :], :])  # (pairs, 2, 2, C, C)
        return np.concatenate(parts).transpose(0, 1, 3, 2, 4)


def _pairs(n_rows: int) -> list[_Pairs]:
    """Return the pairs of a batch, which are the same for every method; a single row is paired with itself."""
    rng = np.random.default_rng(0)
    order = rng.permutation(n_rows)
    parts = np.array_split(order, max(1, -(-n_rows // _CHUNK)))
    return [_Pairs(part.astype(np.int64), anchor_counts(len(part), rng)) for part in parts]


def _moments(samples: Floats) -> Floats:
    """Return the covariance (n, 2, C, 2, C) of samples (S, n, 2, C), unbiased."""
    centred = samples - samples.mean(0)
    found: Floats = np.einsum("snac,snbd->nacbd", centred, centred) / (len(samples) - 1)
    return found


def _log_probs(logits: Floats, kind: str) -> Floats:
    """Return log-probabilities with the classes last: of the classes, or of both values of each Bernoulli output."""
    if kind == "binary":
        return np.stack([log_sigmoid(-logits), log_sigmoid(logits)], axis=-1)
    return log_softmax(logits)


def _log_likelihood(logits: Floats, targets: Floats, kind: str) -> Floats:
    """Return log p(y | f) of samples (S, n, 2, C) at targets (n, 2) or (n, 2, C), summed over Bernoulli outputs."""
    if kind == "binary":
        signs = 2 * targets.reshape(logits.shape[1:]) - 1
        summed: Floats = log_sigmoid(signs * logits).sum(-1)
        return summed
    index = np.broadcast_to(targets.astype(np.int64)[None, ..., None], (*logits.shape[:-1], 1))
    chosen: Floats = np.take_along_axis(log_softmax(logits), index, axis=-1)[..., 0]
    return chosen


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().cpu().double().numpy()
    return array
