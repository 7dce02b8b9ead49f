"""Rows: of queries, and of training data in whatever order, batch or container."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from estimators.testing.case_selection import fitted_cases
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array
from estimators.testing.networks import Array, WithDict
from estimators.testing.outcomes import NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []


@check("batch-independence")
def batch_independence(subject: EstimatorUnderTest) -> None:
    """The variance of a row does not depend on the rows that come with it."""
    for case in fitted_cases(subject, "regression", "classification"):
        estimator = subject.fitted(case)
        if estimator.batch_dependent:
            raise NotApplicable("batch_dependent: it speaks of the set of queries")
        x, together = case.queries, subject.variance(case)
        alone = torch.cat([estimator.variance(row[None]) for row in x])
        backwards = estimator.variance(x.flip(0)).flip(0)
        for how, received in (("by itself", alone), ("in another order", backwards)):
            subject.compare(
                f"the variance of a row of {case.name} {how} as among others",
                as_array(received),
                together,
                fault="a reduction over the wrong dimension, batch statistics, or noise drawn at the query.",
                slack=max(1e-6, subject.claims.tolerance),
            )


@check("training-row-order")
def training_row_order(subject: EstimatorUnderTest) -> None:
    """The order of the training rows is irrelevant."""
    case = subject.cases["classification"]
    shuffled = case.rows(np.random.default_rng(0).permutation(len(case.x)).tolist())
    _same_fit(subject, shuffled.loader, "rows in another order", "rows and targets no longer belong together.")


@check("loader-batch-size")
def loader_batch_size(subject: EstimatorUnderTest) -> None:
    """So is how the loader batches them, with a ragged last batch or without."""
    case = subject.cases["classification"]
    for size in (7, len(case.x)):
        loader = list(zip(case.inputs.split(size), case.targets.split(size), strict=True))
        fault = "the last, smaller batch is dropped or weighs as much as a full one; or means of batches are averaged."
        _same_fit(subject, loader, f"batches of {size}", fault)


def _same_fit(subject: EstimatorUnderTest, loader: list[tuple[Tensor, Tensor]], what: str, fault: str) -> None:
    case = subject.cases["classification"]
    expected = subject.variance(case)
    received = as_array(subject.fit(case, loader=loader).variance(case.queries))
    subject.compare(f"the same variance with {what}", received, expected, fault=fault)


@check("dict-inputs")
def dict_inputs(subject: EstimatorUnderTest) -> None:
    """Batches that are dicts with "labels", queries that are dicts."""
    case = subject.cases["classification"]
    loader = [{**_as_dict(x), "labels": y} for x, y in case.loader]
    estimator = subject.fit(case, WithDict(subject.model(case)).eval(), loader, special=True)
    received: Array = as_array(estimator.variance(_as_dict(case.queries)))
    fault = "x is taken for a tensor; use estimators.numerics.pytrees."
    subject.compare("the variance of the same rows as tensors", received, subject.variance(case), fault=fault)


def _as_dict(x: Tensor) -> dict[str, Any]:
    return {"features": x + 1, "shift": -torch.ones_like(x)}
