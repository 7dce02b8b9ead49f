"""What fit and queries must leave as it was: the model, the random state; and what they must not depend on."""

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


def _with_buffers(subject: EstimatorUnderTest) -> nn.Module:
    """A network with batch statistics in eval mode, partly frozen, with a gradient that is the user's."""
    case = subject.cases["classification"]
    norm = nn.BatchNorm1d(case.x.shape[1]).to(case.device, case.dtype)
    norm.running_mean = torch.full_like(norm.get_buffer("running_mean"), 0.3)
    norm.requires_grad_(False)
    model = nn.Sequential(norm, subject.model(case)).eval()
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    return model


@check("model-untouched-by-fit")
def model_untouched_by_fit(subject: EstimatorUnderTest) -> None:
    """`fit` changes no weight, buffer, mode, requires_grad, gradient or hook."""
    model = _with_buffers(subject)
    with unchanged_model(model, "fit"):
        subject.fit(subject.cases["classification"], model, special=True)


@check("model-untouched-by-queries")
def model_untouched_by_queries(subject: EstimatorUnderTest) -> None:
    """Nor do variance, predict, covariance and sample."""
    case, model = subject.cases["classification"], _with_buffers(subject)
    estimator = subject.fit(case, model, special=True)
    with unchanged_model(model, "the queries"):
        estimator.variance(case.queries)
        estimator.predict(case.queries)
        for ask in (estimator.covariance, lambda x: estimator.sample(x, 2)):
            try:
                ask(case.queries)
            except UNSUPPORTED_ERRORS:
                continue


class _Failing:
    """A loader that raises in its last batch."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.rand(3)
        yield from self.batches[:-1]
        raise _OnPurposeError


class _OnPurposeError(Exception):
    pass


@check("untouched-after-an-exception")
def untouched_after_an_exception(subject: EstimatorUnderTest) -> None:
    """Where the loader raises, model and random state are as they were, and the exception arrives."""
    model = _with_buffers(subject)
    estimator = subject.build(subject.cases["classification"], model)
    with unchanged_random_state("a fit that failed"), unchanged_model(model, "a fit that failed"):
        try:
            estimator.fit(_Failing(subject.cases["classification"].loader))
        except (_OnPurposeError, EstimatorError):
            return
    raise CheckFailure("the exception of the loader", received="a fit", fault="a bare except.")


@check("random-state-untouched")
def random_state_untouched(subject: EstimatorUnderTest) -> None:
    """`fit` with a loader that shuffles, and queries, leave the global random states of torch, numpy and random."""
    case = subject.cases["classification"]
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=6, shuffle=True)
    model = subject.model(case)
    with unchanged_random_state("fit"):
        estimator = subject.fit(case, model, loader)
    with unchanged_random_state("the queries"):
        estimator.variance(case.queries)
        estimator.predict(case.queries)
        try:
            estimator.sample(case.queries, 2)
        except UNSUPPORTED_ERRORS:
            return


@check("reproducible")
def reproducible(subject: EstimatorUnderTest) -> None:
    """Two fits with the same options agree, whatever the global random state."""
    case = subject.cases["classification"]
    expected: Array = subject.variance(case)
    with advanced_random_state():
        estimator = subject.fit(case)
        received = as_array(estimator.variance(case.queries))
        again = as_array(estimator.variance(case.queries))
    for how, found in (("another fit", received), ("another query", again)):
        if not np.allclose(found, expected, rtol=1e-9, atol=0):
            raise CheckFailure(
                f"the same variance, {expected[0, 0]:.6g}, from {how} in another global random state",
                received=f"{found[0, 0]:.6g}",
                fault="draw from a torch.Generator with a seed field, never from the global state.",
            )
