"""The variance against the closed form, for estimators that claim to be exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from estimators.testing import formulas
from estimators.testing.cases import GROUPS, Case
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array
from estimators.testing.outcomes import NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []

_SCALE = "a factor of the loss (2, N, σ²), the prior left out, or Λ of another likelihood."


def _compared(subject: EstimatorUnderTest, case: Case, fault: str = _SCALE) -> None:
    expected = np.diag(formulas.covariance(case, subject.exact)).reshape(len(case.query), -1)
    what = f"the variance J A⁻¹ Jᵀ of {case.name} at δ = {case.delta}"
    subject.compare(what, subject.variance(case), expected, fault=fault, slack=subject.slack(case))


@check("closed-form-regression")
def closed_form_regression(subject: EstimatorUnderTest) -> None:
    """Linear regression: the exact posterior variance."""
    _compared(subject, subject.cases["linear regression"])


@check("closed-form-classification")
def closed_form_classification(subject: EstimatorUnderTest) -> None:
    """Softmax regression on three classes: the Laplace approximation by hand."""
    fault = f"{_SCALE} Or outputs in another order."
    _compared(subject, subject.cases["softmax regression"], fault)


@check("closed-form-binary")
def closed_form_binary(subject: EstimatorUnderTest) -> None:
    """Logistic regression with two outputs."""
    _compared(subject, subject.cases["logistic regression"])


@check("closed-form-network")
def closed_form_network(subject: EstimatorUnderTest) -> None:
    """Networks with a hidden layer, with each likelihood that is taken."""
    taken = 0
    for name in ("regression", "classification", "binary"):
        try:
            _compared(subject, subject.cases[name], f"{_SCALE} Or layers in another order.")
            taken += 1
        except NotApplicable as reason:
            refused = reason
    if not taken:
        raise refused


@check("closed-form-float32")
def closed_form_float32(subject: EstimatorUnderTest) -> None:
    """The same in float32, to 2e-3."""
    case = replace(subject.cases["classification"], name="classification in float32", dtype=torch.float32)
    _compared(subject, case, "a cancellation in float32: do the dense algebra in float64.")


@check("closed-form-prior-groups")
def closed_form_prior_groups(subject: EstimatorUnderTest) -> None:
    """Another prior precision for biases than for weights."""
    case = replace(subject.cases["classification"], name="classification with two priors", delta=GROUPS)
    _compared(subject, case, "one δ for all groups, or δ in the order of the mapping rather than of the parameters.")


@check("closed-form-noise-per-output")
def closed_form_noise_per_output(subject: EstimatorUnderTest) -> None:
    """A noise for each output."""
    case = replace(subject.cases["regression"], name="regression with two noises", sigma=(0.5, 1.4))
    _compared(subject, case, "one σ for all outputs.")


@check("closed-form-frozen")
def closed_form_frozen(subject: EstimatorUnderTest) -> None:
    """Frozen parameters are left out: with the first layer frozen, what remains is the last layer."""
    case = subject.cases["classification"]
    expected = formulas.covariance(case, subject.exact, frozen_first=True)
    variance = np.diag(expected).reshape(len(case.query), -1)
    model = subject.model(case)
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)
    received = as_array(subject.fit(case, model).variance(case.queries))
    fault = "parameters with requires_grad=False are among those of the posterior."
    subject.compare("the variance over the trainable layer alone", received, variance, fault=fault)


@check("closed-form-covariance")
def closed_form_covariance(subject: EstimatorUnderTest) -> None:
    """The covariance between three outputs of a row."""
    case = subject.cases["classification"]
    joint = formulas.covariance(case, subject.exact).reshape(len(case.query), 3, len(case.query), 3)
    expected = np.einsum("mcmd->mcd", joint)
    fault = "blocks transposed or outputs and rows exchanged in a reshape."
    subject.compare("J A⁻¹ Jᵀ, (M, C, C)", subject.covariance(case), expected, fault=fault, slack=_wide(subject))


def _wide(subject: EstimatorUnderTest) -> float:
    """Entries off the diagonal have the noise of the diagonal."""
    return subject.slack() * (1 if not subject.claims.noise else 20)
