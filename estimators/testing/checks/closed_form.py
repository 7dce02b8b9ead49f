"""Checks of the variance against the closed form, for estimators that declare to be exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from estimators.testing import formulas
from estimators.testing.case_selection import fitted_cases
from estimators.testing.cases import GROUPS, Case
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array
from estimators.testing.registry import check

__all__: list[str] = []

_SCALE = "a factor in the loss (2, N, σ²), a missing prior, or Λ of another likelihood."


def _compare(tested: EstimatorUnderTest, case: Case, fault: str = _SCALE) -> None:
    expected = np.diag(formulas.covariance(case, tested.exact)).reshape(len(case.query), -1)
    what = f"the variance J A⁻¹ Jᵀ of {case.name} at δ = {case.delta}"
    tested.compare(what, tested.variance(case), expected, fault=fault, rtol=tested.rtol(case))


@check("closed-form-regression")
def closed_form_regression(tested: EstimatorUnderTest) -> None:
    """Linear regression has the exact posterior variance."""
    _compare(tested, tested.cases["linear regression"])


@check("closed-form-classification")
def closed_form_classification(tested: EstimatorUnderTest) -> None:
    """Softmax regression with three classes has the variance of the Laplace approximation."""
    fault = f"{_SCALE} Or outputs in another order."
    _compare(tested, tested.cases["softmax regression"], fault)


@check("closed-form-binary")
def closed_form_binary(tested: EstimatorUnderTest) -> None:
    """Logistic regression with two outputs has the variance of the Laplace approximation."""
    _compare(tested, tested.cases["logistic regression"])


@check("closed-form-network")
def closed_form_network(tested: EstimatorUnderTest) -> None:
    """Networks with a hidden layer have the variance J A⁻¹ Jᵀ, for each accepted likelihood."""
    _ = tested.exact
    for case in fitted_cases(tested, "regression", "classification", "binary"):
        _compare(tested, case, f"{_SCALE} Or layers in another order.")


@check("closed-form-float32")
def closed_form_float32(tested: EstimatorUnderTest) -> None:
    """A float32 network has the variance J A⁻¹ Jᵀ, to 2e-3."""
    case = replace(tested.cases["classification"], name="classification in float32", dtype=torch.float32)
    _compare(tested, case, "a cancellation in float32: use float64 for dense algebra.")


@check("closed-form-prior-groups")
def closed_form_prior_groups(tested: EstimatorUnderTest) -> None:
    """The variance J A⁻¹ Jᵀ uses different prior precisions for biases and weights."""
    case = replace(tested.cases["classification"], name="classification with two priors", delta=GROUPS)
    _compare(tested, case, "one δ for all groups, or δ in the order of the mapping rather than of the parameters.")


@check("closed-form-noise-per-output")
def closed_form_noise_per_output(tested: EstimatorUnderTest) -> None:
    """The variance J A⁻¹ Jᵀ uses a different noise for each output."""
    case = replace(tested.cases["regression"], name="regression with two noises", sigma=(0.5, 1.4))
    _compare(tested, case, "one σ for all outputs.")


@check("closed-form-frozen")
def closed_form_frozen(tested: EstimatorUnderTest) -> None:
    """Frozen parameters are not in the posterior: with a frozen first layer, the last layer remains."""
    case = tested.cases["classification"]
    expected = formulas.covariance(case, tested.exact, frozen_first=True)
    variance = np.diag(expected).reshape(len(case.query), -1)
    model = tested.model(case)
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)
    received = as_array(tested.fit(case, model).variance(case.queries))
    fault = "the posterior includes parameters with requires_grad=False."
    tested.compare("the variance over the trainable layer alone", received, variance, fault=fault)


@check("closed-form-covariance")
def closed_form_covariance(tested: EstimatorUnderTest) -> None:
    """The covariance between three outputs of a row is J A⁻¹ Jᵀ."""
    case = tested.cases["classification"]
    joint = formulas.covariance(case, tested.exact).reshape(len(case.query), 3, len(case.query), 3)
    expected = np.einsum("mcmd->mcd", joint)
    fault = "blocks transposed or outputs and rows exchanged in a reshape."
    rtol = tested.rtol() * (
        20 if tested.capabilities.noise else 1
    )  # of off-diagonal entries, with the diagonal's noise
    tested.compare("J A⁻¹ Jᵀ, (M, C, C)", tested.covariance(case), expected, fault=fault, rtol=rtol)
