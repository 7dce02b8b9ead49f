"""Checks that `fit` and queries have no side effects on the model and the random state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from estimators.errors import EstimatorError
from estimators.testing.estimator_under_test import UNSUPPORTED_ERRORS, EstimatorUnderTest, as_array
from estimators.testing.networks import Array
from estimators.testing.outcomes import CheckFailure
from estimators.testing.registry import check
from estimators.testing.side_effects import advanced_random_state, unchanged_model, unchanged_random_state

__all__: list[str] = []


def _with_buffers(tested: EstimatorUnderTest) -> nn.Module:
    """Return a network with batch statistics in eval mode, frozen parameters, and a gradient set by the user."""
    case = tested.cases["classification"]
    norm = nn.BatchNorm1d(case.x.shape[1]).to(case.device, case.dtype)
    norm.running_mean = torch.full_like(norm.get_buffer("running_mean"), 0.3)
    norm.requires_grad_(False)
    model = nn.Sequential(norm, tested.model(case)).eval()
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    return model


@check("model-untouched-by-fit")
def model_untouched_by_fit(tested: EstimatorUnderTest) -> None:
    """`fit` changes no weight, buffer, mode, requires_grad, gradient or hook."""
    model = _with_buffers(tested)
    with unchanged_model(model, "fit"):
        tested.fit(tested.cases["classification"], model, may_be_rejected=True)


@check("model-untouched-by-queries")
def model_untouched_by_queries(tested: EstimatorUnderTest) -> None:
    """variance, predict, covariance, sample and score change nothing in the model."""
    case, model = tested.cases["classification"], _with_buffers(tested)
    estimator = tested.fit(case, model, may_be_rejected=True)
    with unchanged_model(model, "the queries"):
        estimator.variance(case.queries)
        estimator.predict(case.queries)
        for ask in (estimator.covariance, lambda x: estimator.sample(x, 2), estimator.score):
            try:
                ask(case.queries)
            except UNSUPPORTED_ERRORS:
                continue


class _Failing:
    """A loader that raises before its last batch."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.rand(3)
        yield from self.batches[:-1]
        raise _LoaderError


class _LoaderError(Exception):
    pass


@check("untouched-after-an-exception")
def untouched_after_an_exception(tested: EstimatorUnderTest) -> None:
    """If the loader raises, the exception is passed on, and model and random state do not change."""
    model = _with_buffers(tested)
    estimator = tested.build(tested.cases["classification"], model)
    with unchanged_random_state("a fit that failed"), unchanged_model(model, "a fit that failed"):
        try:
            estimator.fit(_Failing(tested.cases["classification"].loader))
        except (_LoaderError, EstimatorError):
            return
    raise CheckFailure("the exception of the loader", received="a fit", fault="a bare except.")


@check("random-state-untouched")
def random_state_untouched(tested: EstimatorUnderTest) -> None:
    """`fit` with a shuffling loader, and queries, keep the random states of torch, numpy and random."""
    case = tested.cases["classification"]
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=6, shuffle=True)
    model = tested.model(case)
    with unchanged_random_state("fit"):
        estimator = tested.fit(case, model, loader)
    with unchanged_random_state("the queries"):
        estimator.variance(case.queries)
        estimator.predict(case.queries)
        try:
            estimator.sample(case.queries, 2)
        except UNSUPPORTED_ERRORS:
            return


@check("reproducible")
def reproducible(tested: EstimatorUnderTest) -> None:
    """Two fits with the same options agree, whatever the global random state."""
    case = tested.cases["classification"]
    expected: Array = tested.variance(case)
    with advanced_random_state():
        estimator = tested.fit(case)
        received = as_array(estimator.variance(case.queries))
        again = as_array(estimator.variance(case.queries))
    for how, found in (("another fit", received), ("another query", again)):
        if not np.allclose(found, expected, rtol=1e-9, atol=0):
            raise CheckFailure(
                f"the same variance, {expected[0, 0]:.6g}, from {how} in another global random state",
                received=f"{found[0, 0]:.6g}",
                fault="draw from a torch.Generator with a seed field, never from the global state.",
            )
