"""Checks of construction, fit, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
def supports_a_model(tested: EstimatorUnderTest) -> None:
    """The estimator accepts at least one of the kit's models, so that the other checks have a fit."""
    rejected = {}
    for case in tested.cases.values():
        try:
            tested.fitted(case)
        except NotApplicable as reason:
            rejected[case.name] = str(reason)
    if len(rejected) == len(tested.cases):
        raise CheckFailure(
            f"an estimator that accepts one of {', '.join(tested.cases)}",
            received=f"one that rejects all of them; the first: {next(iter(rejected.values()))}",
            fault="make must pass on model, likelihood and prior_precision; adapt= converts the networks.",
        )


@check("constructor-stores")
def constructor_stores(tested: EstimatorUnderTest) -> None:
    """The constructor stores its arguments; it neither runs the network nor computes learned attributes."""
    case = any_case(tested)
    model, calls = tested.model(case), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    estimator = tested.build(case, model)
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
            fault="pass both to super().__init__; fit makes the copies.",
        )


@check("not-fitted")
def not_fitted(tested: EstimatorUnderTest) -> None:
    """Queries before `fit` raise NotFittedError."""
    case = any_case(tested)
    estimator, x = tested.build(case), case.queries
    for name, query in (("variance", estimator.variance), ("predict", estimator.predict)):
        try:
            query(x)
        except NotFittedError:
            continue
        except Exception as error:
            received = f"{type(error).__name__}: {error}"
        else:
            received = "no error"
        raise CheckFailure(
            f"NotFittedError from {name} before fit",
            received=received,
            fault="override _variance, not variance; or call self._check_fitted() first.",
        )


@check("fit-returns-self")
def fit_returns_self(tested: EstimatorUnderTest) -> None:
    """`fit` returns the estimator."""
    case = any_case(tested)
    estimator = tested.build(case)
    try:
        returned = estimator.fit(case.loader)
    except UNSUPPORTED_ERRORS as error:
        raise NotApplicable(f"rejected: {error}") from error
    if returned is not estimator:
        raise CheckFailure("the estimator itself from fit", received=repr(returned), fault="return self.")


@check("shapes")
def shapes(tested: EstimatorUnderTest) -> None:
    """variance, mean and epistemic_variance are (M, C), also for a single query."""
    for case in fitted_cases(tested, "regression", "classification"):
        estimator, outputs = tested.fitted(case), len(case.network.weights[-1])
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
                        fault="return (M, C) from _variance also for M = 1, without squeeze().",
                    )


@check("output-shape")
def output_shape(tested: EstimatorUnderTest) -> None:
    """For outputs (M, 2, 1) the variance is (M, 2, 1)."""
    case = first_case(tested, "regression", "binary")
    shaped = nn.Sequential(tested.model(case), nn.Unflatten(1, (2, 1))).eval()
    loader = [(x, y[..., None]) for x, y in case.loader]
    variance = tested.fit(case, shaped, loader, may_be_rejected=True).variance(case.queries)
    expected = (len(case.query), 2, 1)
    if tuple(variance.shape) != expected:
        raise CheckFailure(
            f"a variance of the shape of the outputs, {expected}",
            received=f"{tuple(variance.shape)}",
            fault="override _variance, which returns (M, C); variance reshapes it to the outputs.",
        )


_LOGS = ("predict's log_probs", "predict's log_odds")
"""Results that are float64 for any network, since they have digits that `probs` loses."""


@check("dtype-device")
def dtype_device(tested: EstimatorUnderTest) -> None:
    """All results for a float32 network are float32 (logs of probabilities float64), detached, on its device."""
    case = replace(any_case(tested), name="in float32", dtype=torch.float32)
    for name, tensor in _results(tested.fitted(case), case.queries):
        dtype = algebra_dtype(tensor.device) if name in _LOGS else torch.float32
        if tensor.dtype != dtype or tensor.device != case.queries.device or tensor.requires_grad:
            expected = str(dtype).removeprefix("torch.")
            raise CheckFailure(
                f"a detached {expected} tensor on {case.queries.device}, the device of the model, from {name}",
                received=f"{tensor.dtype} on {tensor.device}, requires_grad={tensor.requires_grad}",
                fault="convert back after dense algebra: .to(features); compute under torch.no_grad().",
            )


def _results(estimator: UncertaintyEstimator, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a fit returns for queries, with its name."""
    yield "variance", estimator.variance(x)
    for name, value in vars(estimator.predict(x)).items():
        if isinstance(value, Tensor):
            yield f"predict's {name}", value
    queries: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("covariance", estimator.covariance),
        ("sample", lambda x: estimator.sample(x, 3)),
        ("variance of a function", lambda x: estimator.variance(x, of=lambda f: f - f.mean())),
    )
    for name, query in queries:
        try:
            yield name, query(x)
        except UNSUPPORTED_ERRORS:
            continue


@check("finite")
def finite(tested: EstimatorUnderTest) -> None:
    """No variance is NaN or Inf, also far from the data."""
    for case in fitted_cases(tested, *tested.cases):
        variance = tested.fitted(case).variance(10 * case.queries)
        if not bool(torch.isfinite(variance).all()):
            raise CheckFailure(
                f"finite variances on {case.name}, ten times as far from 0 as the data",
                received=f"{int((~torch.isfinite(variance)).sum())} NaN or Inf",
                fault="a factorisation of an indefinite matrix, or a division by S − 1 = 0.",
            )


@check("fit-idempotent")
def fit_idempotent(tested: EstimatorUnderTest) -> None:
    """A second fit equals a first fit, whatever data the estimator was fitted to before."""
    case = any_case(tested)
    expected = tested.variance(case)
    estimator = tested.fit(case.rows(list(range(5))))
    try:
        received = estimator.fit(case.loader).variance(case.queries)
    except EstimatorError as error:
        raise CheckFailure(
            "a second fit", received=str(error), fault="fit must not depend on an earlier fit."
        ) from error
    if not np.allclose(as_array(received), expected, rtol=1e-9, atol=0):
        raise CheckFailure(
            f"the variance of a fresh fit, {expected[0, 0]:.6g}",
            received=f"{float(received[0, 0]):.6g} after a fit to other rows",
            fault="sums continue from the last fit; set every learned attribute in _fit.",
        )
