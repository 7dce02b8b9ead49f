"""Construction, fit, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from estimators.errors import EstimatorError, NotFittedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.numerics.dtype import algebra_dtype
from estimators.testing.case_selection import any_case, first_case, fitted_cases
from estimators.testing.estimator_under_test import UNSUPPORTED_ERRORS, EstimatorUnderTest, as_array
from estimators.testing.outcomes import CheckFailure, NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []


@check("supports-a-model")
def supports_a_model(subject: EstimatorUnderTest) -> None:
    """At least one of the kit's models is taken, so that the other checks have something to look at."""
    refused = {}
    for case in subject.cases.values():
        try:
            subject.fitted(case)
        except NotApplicable as reason:
            refused[case.name] = str(reason)
    if len(refused) == len(subject.cases):
        raise CheckFailure(
            f"an estimator that takes one of {', '.join(subject.cases)}",
            received=f"one that refuses all of them; the first: {next(iter(refused.values()))}",
            fault="make passes on model, likelihood and prior_precision; adapt= changes the networks to what it needs.",
        )


@check("constructor-stores")
def constructor_stores(subject: EstimatorUnderTest) -> None:
    """The constructor stores its arguments, and neither runs the network nor learns anything."""
    case = any_case(subject)
    model, calls = subject.model(case), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    estimator = subject.build(case, model)
    learned = [name for name in vars(estimator) if name.endswith("_") and not name.startswith("_")]
    if calls or learned:
        raise CheckFailure(
            "a constructor that only stores",
            received=f"{len(calls)} calls of the network, learned attributes {learned}",
            fault="move the work to _fit.",
        )
    if estimator.model is not model or estimator.prior_precision != case.delta:
        raise CheckFailure(
            f"the model itself and prior_precision={case.delta}",
            received=f"{'the model' if estimator.model is model else 'a copy'}, {estimator.prior_precision}",
            fault="pass both to super().__init__; copies are made in fit.",
        )


@check("not-fitted")
def not_fitted(subject: EstimatorUnderTest) -> None:
    """Before fit, queries raise NotFittedError."""
    case = any_case(subject)
    estimator, x = subject.build(case), case.queries
    for name, ask in (("variance", estimator.variance), ("predict", estimator.predict)):
        try:
            ask(x)
        except NotFittedError:
            continue
        except Exception as error:
            received = f"{type(error).__name__}: {error}"
        else:
            received = "an answer"
        raise CheckFailure(
            f"NotFittedError from {name} before fit",
            received=received,
            fault="override _variance, not variance; or call self._check_fitted() first.",
        )


@check("fit-returns-self")
def fit_returns_self(subject: EstimatorUnderTest) -> None:
    """`fit` returns the estimator."""
    case = any_case(subject)
    estimator = subject.build(case)
    try:
        returned = estimator.fit(case.loader)
    except UNSUPPORTED_ERRORS as error:
        raise NotApplicable(f"refuses it: {error}") from error
    if returned is not estimator:
        raise CheckFailure("the estimator itself from fit", received=repr(returned), fault="return self.")


@check("shapes")
def shapes(subject: EstimatorUnderTest) -> None:
    """variance, mean and epistemic_variance are (M, C), for one query, too."""
    for case in fitted_cases(subject, "regression", "classification"):
        estimator, outputs = subject.fitted(case), len(case.network.weights[-1])
        for m in (1, len(case.query)):
            x = case.queries[:m]
            prediction = estimator.predict(x)
            found = {
                "variance(x)": estimator.variance(x),
                "predict(x).mean": prediction.mean,
                "predict(x).epistemic_variance": prediction.epistemic_variance,
            }
            for what, tensor in found.items():
                if tuple(tensor.shape) != (m, outputs):
                    raise CheckFailure(
                        f"{what} of shape {(m, outputs)}",
                        received=f"{tuple(tensor.shape)}",
                        fault="return (M, C) from _variance, also for M = 1: no squeeze().",
                    )


@check("output-shape")
def output_shape(subject: EstimatorUnderTest) -> None:
    """For outputs (M, 2, 1) the variance is (M, 2, 1), with the same values."""
    case = first_case(subject, "regression", "binary")
    shaped = nn.Sequential(subject.model(case), nn.Unflatten(1, (2, 1))).eval()
    loader = [(x, y[..., None]) for x, y in case.loader]
    variance = subject.fit(case, shaped, loader, special=True).variance(case.queries)
    expected = (len(case.query), 2, 1)
    if tuple(variance.shape) != expected:
        raise CheckFailure(
            f"a variance of the shape of the outputs, {expected}",
            received=f"{tuple(variance.shape)}",
            fault="override _variance, which gives (M, C); variance gives it the shape of the outputs.",
        )


_LOGS = ("predict's log_probs", "predict's log_odds")
"""In float64 whatever the network's dtype: they keep what `probs` rounds away."""


@check("dtype-device")
def dtype_device(subject: EstimatorUnderTest) -> None:
    """All that a float32 network is asked for is float32 (logs of probabilities float64), detached, on its device."""
    case = replace(any_case(subject), name="in float32", dtype=torch.float32)
    for name, tensor in _answers(subject.fitted(case), case.queries):
        dtype = algebra_dtype(tensor.device) if name in _LOGS else torch.float32
        if tensor.dtype != dtype or tensor.device != case.queries.device or tensor.requires_grad:
            expected = str(dtype).removeprefix("torch.")
            raise CheckFailure(
                f"a detached {expected} tensor on {case.queries.device}, the device of the model, from {name}",
                received=f"{tensor.dtype} on {tensor.device}, requires_grad={tensor.requires_grad}",
                fault="convert back after dense algebra: .to(features); compute under torch.no_grad().",
            )


def _answers(estimator: UncertaintyEstimator, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a fit gives at queries, with the question."""
    yield "variance", estimator.variance(x)
    for name, value in vars(estimator.predict(x)).items():
        if isinstance(value, Tensor):
            yield f"predict's {name}", value
    for name, ask in (("covariance", estimator.covariance), ("sample", lambda x: estimator.sample(x, 3))):
        try:
            yield name, ask(x)
        except UNSUPPORTED_ERRORS:
            continue


@check("finite")
def finite(subject: EstimatorUnderTest) -> None:
    """No NaN or Inf, also far from the data."""
    for case in subject.cases.values():
        try:
            estimator = subject.fitted(case)
        except NotApplicable:
            continue
        variance = estimator.variance(10 * case.queries)
        if not bool(torch.isfinite(variance).all()):
            raise CheckFailure(
                f"finite variances on {case.name}, ten times as far out as the data",
                received=f"{int((~torch.isfinite(variance)).sum())} NaN or Inf",
                fault="a factorisation that lost its definiteness, or a division by an unbiased count of one.",
            )


@check("fit-idempotent")
def fit_idempotent(subject: EstimatorUnderTest) -> None:
    """A second fit is as a first one, whatever the first was of."""
    case = any_case(subject)
    expected = subject.variance(case)
    estimator = subject.fit(case.rows(list(range(5))))
    try:
        received = estimator.fit(case.loader).variance(case.queries)
    except EstimatorError as error:
        raise CheckFailure("a second fit", received=str(error), fault="fit must start afresh.") from error
    if not np.allclose(as_array(received), expected, rtol=1e-9, atol=0):
        raise CheckFailure(
            f"the variance of a fresh fit, {expected[0, 0]:.6g}",
            received=f"{float(received[0, 0]):.6g} after a fit to other rows",
            fault="sums that go on from the last fit; set every learned attribute anew in _fit.",
        )
