"""Checks of the results of predict: mean, noise, total variance, probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from estimators.likelihoods.prediction import MONTE_CARLO, Prediction
from estimators.testing import formulas
from estimators.testing.case_selection import fitted_cases
from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array
from estimators.testing.networks import Array
from estimators.testing.outcomes import CheckFailure, NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []

_ROUND_OFF = 1e-9


def _predictions(tested: EstimatorUnderTest, *names: str) -> Iterator[tuple[Case, Prediction]]:
    """Yield the predictions of the cases that the estimator accepts."""
    for case in fitted_cases(tested, *names):
        yield case, tested.fitted(case).predict(case.queries)


@check("predict-mean")
def predict_mean(tested: EstimatorUnderTest) -> None:
    """The mean is the output of the network."""
    for case, prediction in _predictions(tested, "regression", "classification", "binary"):
        expected = case.network.outputs(case.query)
        fault = "the mean of samples or of a perturbed network, or outputs in another order."
        tested.compare(f"f(x) on {case.name}", as_array(prediction.mean), expected, fault=fault, rtol=1e-9)


@check("predict-epistemic")
def predict_epistemic(tested: EstimatorUnderTest) -> None:
    """predict(x).epistemic_variance equals variance(x)."""
    for case, prediction in _predictions(tested, "regression", "classification", "binary"):
        received = as_array(prediction.epistemic_variance)
        fault = "predict computes the variance in another way."
        tested.compare("variance(x)", received, tested.variance(case), fault=fault, rtol=_ROUND_OFF)


@check("total-variance")
def total_variance(tested: EstimatorUnderTest) -> None:
    """In regression, the total variance is the epistemic one plus the aleatoric one, σ²."""
    case = replace(tested.cases["regression"], name="regression with a large noise", sigma=30.0, delta=1e4)
    prediction = tested.fitted(case).predict(case.queries)
    if prediction.aleatoric_variance is None or prediction.total_variance is None:
        raise CheckFailure(
            "aleatoric_variance and total_variance in regression",
            received="None",
            fault="construct the Prediction by self.likelihood.predict(mean, variance, None).",
        )
    noise, total = as_array(prediction.aleatoric_variance), as_array(prediction.total_variance)
    variance = as_array(prediction.epistemic_variance)
    fault = "σ instead of σ², or the epistemic variance included."
    tested.compare("aleatoric_variance σ²", noise, np.full_like(noise, 900.0), fault=fault, rtol=1e-6)
    fault = "the noise missing or added twice, or a sum of standard deviations."
    tested.compare("epistemic + aleatoric", total, variance + noise, fault=fault, rtol=_ROUND_OFF)


@check("noise-not-epistemic")
def noise_not_epistemic(tested: EstimatorUnderTest) -> None:
    """variance(x) contains no observation noise: with a large δ it is far below σ²."""
    _ = tested.prior_of
    case = replace(tested.cases["regression"], name="regression with a large noise", sigma=30.0, delta=1e4)
    variance = as_array(tested.fitted(case).variance(case.queries))
    if variance.max() > 1.0:
        raise CheckFailure(
            "an epistemic variance below 1e-3 σ² at δ = 1e4",
            received=f"{variance.max() / 900:.3g} σ²",
            fault="observation noise is added to variance(x); predict adds it.",
        )


@check("probabilities")
def probabilities(tested: EstimatorUnderTest) -> None:
    """Class probabilities lie in [0, 1] and sum to 1, and the entropies are theirs."""
    for case, prediction in _predictions(tested, "classification", "binary"):
        probs, entropy = _probs_and_entropy(prediction, case)
        if probs.min() < 0 or probs.max() > 1:
            raise CheckFailure("probs in [0, 1]", received=f"{probs.min():.4g} to {probs.max():.4g}", fault="logits.")
        expected = -np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-300)), 0)
        if case.kind == "binary":
            expected -= np.where(probs < 1, (1 - probs) * np.log(np.maximum(1 - probs, 1e-300)), 0)
        else:
            fault = "sigmoids instead of a softmax, or a sum over rows."
            tested.compare("probs that sum to 1", probs.sum(-1), np.ones(len(probs)), fault=fault, rtol=1e-9)
            expected = expected.sum(-1)
        fault = "another base of the logarithm, or the entropy of the network's own probabilities."
        tested.compare("the entropy of probs in nats", entropy, expected, fault=fault, rtol=1e-6)


def _probs_and_entropy(prediction: Prediction, case: Case) -> tuple[Array, Array]:
    if prediction.probs is None or prediction.entropy is None:
        raise CheckFailure(f"probs and entropy on {case.name}", received="None", fault="Prediction without them.")
    return as_array(prediction.probs), as_array(prediction.entropy)


@check("link")
def link(tested: EstimatorUnderTest) -> None:
    """Probabilities are those of the probit link of mean and variance, or the mean over the returned samples."""
    for case, prediction in _predictions(tested, "classification", "binary"):
        probs = _probs_and_entropy(prediction, case)[0]
        samples = getattr(prediction, "samples", None)
        if prediction.link_approx in MONTE_CARLO:
            if samples is None:
                raise NotApplicable("a Monte-Carlo prediction without its samples")
            per_sample = samples.softmax(-1) if case.kind == "classification" else torch.sigmoid(samples)
            expected = as_array(per_sample.mean(0))
        else:
            expected = formulas.link(case, as_array(prediction.mean), as_array(prediction.epistemic_variance))
        fault = "a link without the variance or with the standard deviation, or a wrong factor π/8."
        tested.compare(f"the link of mean and variance on {case.name}", probs, expected, fault=fault, rtol=1e-8)
