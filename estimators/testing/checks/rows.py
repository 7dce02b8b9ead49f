"""Checks that results do not depend on the order, batch or container of query and training rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from estimators.testing.case_selection import fitted_cases
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array, if_supported
from estimators.testing.networks import Array, WithDict
from estimators.testing.outcomes import CheckFailure, NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []


@check("batch-independence")
def batch_independence(tested: EstimatorUnderTest) -> None:
    """The variance of a row does not depend on the other rows of the query."""
    for case in fitted_cases(tested, "regression", "classification"):
        estimator = tested.fitted(case)
        if estimator.batch_dependent:
            raise NotApplicable("batch_dependent: the variance depends on all rows of the query")
        x, together = case.queries, tested.variance(case)
        alone = torch.cat([estimator.variance(row[None]) for row in x])
        backwards = estimator.variance(x.flip(0)).flip(0)
        for how, received in (("alone", alone), ("in another order", backwards)):
            tested.compare(
                f"the variance of a row of {case.name} {how}, equal to that among other rows",
                as_array(received),
                together,
                fault="a reduction over the wrong dimension, batch statistics, or noise drawn at the query.",
                rtol=max(1e-6, tested.capabilities.tolerance),
            )


@check("score")
def score(tested: EstimatorUnderTest) -> None:
    """Out-of-distribution scores are (M,), finite and detached; rows alone and a saved fit have the same scores."""
    for case in fitted_cases(tested, "regression", "classification"):
        estimator, x = tested.fitted(case), case.queries
        together = if_supported(lambda: estimator.score(x))  # noqa: B023
        if together.shape != (len(x),) or not bool(torch.isfinite(together).all()) or together.requires_grad:
            raise CheckFailure(
                f"finite, detached scores of shape {(len(x),)}",
                received=f"shape {tuple(together.shape)}, {int((~torch.isfinite(together)).sum())} NaN or Inf, "
                f"requires_grad={together.requires_grad}",
                fault="return one number per row from _score, higher for rows unlike the training rows.",
            )
        expected, fault = as_array(together), "a reduction over the wrong dimension, or statistics of the query."
        alone = as_array(torch.cat([estimator.score(row[None]) for row in x]))
        tested.compare(f"the score of a row of {case.name} alone", alone, expected, fault=fault, rtol=1e-6)
        far = estimator.score(10 * x)
        if not bool(torch.isfinite(far).all() & (far.mean() > together.mean())):
            raise CheckFailure(
                f"finite scores, higher on average ten times as far from the data than {float(together.mean()):.4g}",
                received=f"{float(far.mean()):.4g}",
                fault="the sign of the score: a high one says that a row is unlike the training rows.",
            )
        loaded = tested.build(case, estimator.model).load_state_dict(estimator.state_dict())
        fault = "_get_fit_state leaves out what _score needs, or _set_fit_state does not put it back."
        tested.compare("the score of the saved fit", as_array(loaded.score(x)), expected, fault=fault, rtol=1e-7)


@check("training-row-order")
def training_row_order(tested: EstimatorUnderTest) -> None:
    """The variance does not depend on the order of the training rows."""
    case = tested.cases["classification"]
    shuffled = case.rows(np.random.default_rng(0).permutation(len(case.x)).tolist())
    _same_fit(tested, shuffled.loader, "rows in another order", "rows and targets no longer belong together.")


@check("loader-batch-size")
def loader_batch_size(tested: EstimatorUnderTest) -> None:
    """The variance does not depend on the batch size of the loader, with or without a smaller last batch."""
    case = tested.cases["classification"]
    for size in (7, len(case.x)):
        loader = list(zip(case.inputs.split(size), case.targets.split(size), strict=True))
        fault = "the smaller last batch is dropped or weighted as a full one, or means of batches are averaged."
        _same_fit(tested, loader, f"batches of {size}", fault)


def _same_fit(tested: EstimatorUnderTest, loader: list[tuple[Tensor, Tensor]], what: str, fault: str) -> None:
    case = tested.cases["classification"]
    expected = tested.variance(case)
    received = as_array(tested.fit(case, loader=loader).variance(case.queries))
    tested.compare(f"the same variance with {what}", received, expected, fault=fault)


@check("dict-inputs")
def dict_inputs(tested: EstimatorUnderTest) -> None:
    """Training batches may be dicts with "labels", and queries may be dicts."""
    case = tested.cases["classification"]
    loader = [{**_as_dict(x), "labels": y} for x, y in case.loader]
    estimator = tested.fit(case, WithDict(tested.model(case)).eval(), loader, may_be_rejected=True)
    received: Array = as_array(estimator.variance(_as_dict(case.queries)))
    fault = "the code assumes that x is a tensor; use estimators.numerics.pytrees."
    tested.compare("the variance of the same rows as tensors", received, tested.variance(case), fault=fault)


def _as_dict(x: Tensor) -> dict[str, Any]:
    return {"features": x + 1, "shift": -torch.ones_like(x)}
