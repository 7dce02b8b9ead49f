"""What predict returns: mean, noise, total variance, probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from estimators.likelihoods.prediction import Prediction
from estimators.testing import formulas
from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array
from estimators.testing.networks import Array
from estimators.testing.outcomes import CheckFailure, NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []

_CLOSE = 1e-9


def _predicted(subject: EstimatorUnderTest, *names: str) -> Iterator[tuple[Case, Prediction]]:
    """Of the cases that are taken."""
    taken = 0
    for name in names:
        try:
            yield subject.cases[name], subject.fitted(subject.cases[name]).predict(subject.cases[name].queries)
            taken += 1
        except NotApplicable as reason:
            refused = reason
    if not taken:
        raise refused


@check("predict-mean")
def predict_mean(subject: EstimatorUnderTest) -> None:
    """The mean is the output of the network."""
    for case, prediction in _predicted(subject, "regression", "classification", "binary"):
        expected = case.network.outputs(case.query)
        fault = "the mean of samples, or of a displaced network; outputs in another order."
        subject.compare(f"f(x) on {case.name}", as_array(prediction.mean), expected, fault=fault, slack=1e-9)


@check("predict-epistemic")
def predict_epistemic(subject: EstimatorUnderTest) -> None:
    """predict(x).epistemic_variance is variance(x)."""
    for case, prediction in _predicted(subject, "regression", "classification", "binary"):
        received = as_array(prediction.epistemic_variance)
        fault = "predict computes a variance of its own."
        subject.compare("variance(x)", received, subject.variance(case), fault=fault, slack=_CLOSE)


@check("total-variance")
def total_variance(subject: EstimatorUnderTest) -> None:
    """In regression total = epistemic + aleatoric, the latter σ², and neither is in the other."""
    case = replace(subject.cases["regression"], name="regression with a large noise", sigma=30.0, delta=1e4)
    prediction = subject.fitted(case).predict(case.queries)
    if prediction.aleatoric_variance is None or prediction.total_variance is None:
        raise CheckFailure(
            "aleatoric_variance and total_variance in regression",
            received="None",
            fault="let the likelihood make the Prediction: self.likelihood.predict(mean, variance, None).",
        )
    noise, total = as_array(prediction.aleatoric_variance), as_array(prediction.total_variance)
    variance = as_array(prediction.epistemic_variance)
    fault = "σ in place of σ², or the epistemic variance in it."
    subject.compare("aleatoric_variance σ²", noise, np.full_like(noise, 900.0), fault=fault, slack=1e-6)
    fault = "the noise left out or added twice, or a sum of standard deviations."
    subject.compare("epistemic + aleatoric", total, variance + noise, fault=fault, slack=_CLOSE)


@check("noise-not-epistemic")
def noise_not_epistemic(subject: EstimatorUnderTest) -> None:
    """variance(x) has no observation noise in it: with little left to learn it is far below σ²."""
    _ = subject.prior_of
    case = replace(subject.cases["regression"], name="regression with a large noise", sigma=30.0, delta=1e4)
    variance = as_array(subject.fitted(case).variance(case.queries))
    if variance.max() > 1.0:
        raise CheckFailure(
            "an epistemic variance below 1e-3 σ² at δ = 1e4",
            received=f"{variance.max() / 900:.3g} σ²",
            fault="observation noise is added to variance(x); predict adds it.",
        )


@check("probabilities")
def probabilities(subject: EstimatorUnderTest) -> None:
    """Class probabilities lie in [0, 1] and sum to 1; entropies go with them."""
    for case, prediction in _predicted(subject, "classification", "binary"):
        probs, entropy = _both(prediction, case)
        if probs.min() < 0 or probs.max() > 1:
            raise CheckFailure("probs in [0, 1]", received=f"{probs.min():.4g} to {probs.max():.4g}", fault="logits.")
        by_hand = -np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-300)), 0)
        if case.kind == "binary":
            by_hand -= np.where(probs < 1, (1 - probs) * np.log(np.maximum(1 - probs, 1e-300)), 0)
        else:
            fault = "sigmoids in place of a softmax, or a sum over rows."
            subject.compare("probs that sum to 1", probs.sum(-1), np.ones(len(probs)), fault=fault, slack=1e-9)
            by_hand = by_hand.sum(-1)
        fault = "another base of the logarithm, or the entropy of the network's own probabilities."
        subject.compare("the entropy of probs in nats", entropy, by_hand, fault=fault, slack=1e-6)


def _both(prediction: Prediction, case: Case) -> tuple[Array, Array]:
    if prediction.probs is None or prediction.entropy is None:
        raise CheckFailure(f"probs and entropy on {case.name}", received="None", fault="Prediction without them.")
    return as_array(prediction.probs), as_array(prediction.entropy)


@check("link")
def link(subject: EstimatorUnderTest) -> None:
    """Probabilities are those of mean and variance by the probit link, or the mean over the samples that came along."""
    for case, prediction in _predicted(subject, "classification", "binary"):
        probs = _both(prediction, case)[0]
        samples = getattr(prediction, "samples", None)
        if prediction.link_approx == "mc":
            if samples is None:
                raise NotApplicable("a Monte-Carlo prediction without its samples")
            of_each = samples.softmax(-1) if case.kind == "classification" else torch.sigmoid(samples)
            expected = as_array(of_each.mean(0))
        else:
            expected = formulas.link(case, as_array(prediction.mean), as_array(prediction.epistemic_variance))
        fault = "a link without the variance, or with a standard deviation in its place; π/8."
        subject.compare(f"the link of mean and variance on {case.name}", probs, expected, fault=fault, slack=1e-8)
