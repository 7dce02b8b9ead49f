"""Checks that invalid input raises a typed error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from estimators.errors import EstimatorError
from estimators.testing.case_selection import any_case, first_case
from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import EstimatorUnderTest
from estimators.testing.outcomes import CheckFailure
from estimators.testing.registry import check

__all__: list[str] = []

_FAULT = "override _fit and _variance; fit and variance check their input before they call them."


def _check_rejected(what: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except EstimatorError:
        return
    except Exception as error:
        received = f"{type(error).__name__}: {error}"
    else:
        received = "no error"
    raise CheckFailure(f"an error of estimators.errors for {what}", received=received, fault=_FAULT)


def _check_loader_rejected(
    tested: EstimatorUnderTest, case: Case, what: str, loader: Iterable[Any], model: nn.Module | None = None
) -> None:
    estimator = tested.build(case, model)
    _check_rejected(what, lambda: estimator.fit(loader))


def _with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


@check("rejects-target-shape")
def rejects_target_shape(tested: EstimatorUnderTest) -> None:
    """Targets (N, C) of another shape than the outputs are rejected, and never broadcast."""
    case = first_case(tested, "regression", "binary")
    _check_loader_rejected(tested, case, "targets (B,) for outputs (B, 2)", [(x, y[:, 0]) for x, y in case.loader])
    _check_loader_rejected(tested, case, "targets (B, 1) for outputs (B, 2)", [(x, y[:, :1]) for x, y in case.loader])
    _check_loader_rejected(tested, case, "fewer targets than rows", [(x, y[:-1]) for x, y in case.loader])


@check("rejects-input-shape")
def rejects_input_shape(tested: EstimatorUnderTest) -> None:
    """Rows with another number of features are rejected, in training and in queries."""
    case = any_case(tested)
    _check_loader_rejected(tested, case, "training rows of 2 features", [(x[:, :2], y) for x, y in case.loader])
    _check_rejected("queries of 2 features", lambda: tested.fitted(case).variance(case.queries[:, :2]))


@check("rejects-nan")
def rejects_nan(tested: EstimatorUnderTest) -> None:
    """NaN in rows, targets, weights and queries is rejected."""
    case = any_case(tested)
    _check_loader_rejected(tested, case, "NaN among the rows", [(_with_nan(x), y) for x, y in case.loader])
    if case.kind != "classification":
        _check_loader_rejected(tested, case, "NaN among the targets", [(x, _with_nan(y)) for x, y in case.loader])
    model = tested.model(case)
    next(model.parameters()).detach().view(-1)[0] = float("nan")
    _check_loader_rejected(tested, case, "NaN among the weights", case.loader, model)
    _check_rejected("NaN among the queries", lambda: tested.fitted(case).variance(_with_nan(case.queries)))


@check("rejects-one-shot-loader")
def rejects_one_shot_loader(tested: EstimatorUnderTest) -> None:
    """An iterator, which has no second pass, and a loader without rows are rejected."""
    case = any_case(tested)
    _check_loader_rejected(tested, case, "a one-shot iterator", iter(case.loader))
    _check_loader_rejected(tested, case, "a loader without rows", [])


@check("rejects-train-mode")
def rejects_train_mode(tested: EstimatorUnderTest) -> None:
    """A network with dropout or batch statistics in train mode is rejected."""
    case = any_case(tested)
    for layer in (nn.Dropout(0.3), nn.BatchNorm1d(case.x.shape[1]).to(case.device, case.dtype)):
        model = nn.Sequential(layer, tested.model(case)).train()
        _check_loader_rejected(tested, case, f"{type(layer).__name__} in train mode", case.loader, model)


@check("rejects-empty-query")
def rejects_empty_query(tested: EstimatorUnderTest) -> None:
    """A query without rows is rejected."""
    case = any_case(tested)
    _check_rejected("a query without rows", lambda: tested.fitted(case).variance(case.queries[:0]))


@check("notices-a-changed-model")
def notices_a_changed_model(tested: EstimatorUnderTest) -> None:
    """A query raises if the weights have changed since `fit`."""
    case = any_case(tested)
    model = tested.model(case)
    estimator = tested.fit(case, model)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    _check_rejected("a query after a weight was changed", lambda: estimator.variance(case.queries))
