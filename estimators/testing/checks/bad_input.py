"""Bad input is refused with a typed error that says what was expected, what was received and what to try."""

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

_FAULT = "override _fit and _variance, not fit and variance, whose checks come first."


def _refused(what: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except EstimatorError:
        return
    except Exception as error:
        received = f"{type(error).__name__}: {error}"
    else:
        received = "an answer"
    raise CheckFailure(f"an error of estimators.errors for {what}", received=received, fault=_FAULT)


def _refuses_loader(
    subject: EstimatorUnderTest, case: Case, what: str, loader: Iterable[Any], model: nn.Module | None = None
) -> None:
    estimator = subject.build(case, model)
    _refused(what, lambda: estimator.fit(loader))


def _spoiled(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


@check("rejects-target-shape")
def rejects_target_shape(subject: EstimatorUnderTest) -> None:
    """Targets (N, C) of another shape than the outputs: nothing is broadcast silently."""
    case = first_case(subject, "regression", "binary")
    _refuses_loader(subject, case, "targets (B,) for outputs (B, 2)", [(x, y[:, 0]) for x, y in case.loader])
    _refuses_loader(subject, case, "targets (B, 1) for outputs (B, 2)", [(x, y[:, :1]) for x, y in case.loader])
    _refuses_loader(subject, case, "fewer targets than rows", [(x, y[:-1]) for x, y in case.loader])


@check("rejects-input-shape")
def rejects_input_shape(subject: EstimatorUnderTest) -> None:
    """Rows with another number of features, in training and at the query."""
    case = any_case(subject)
    _refuses_loader(subject, case, "training rows of 2 features", [(x[:, :2], y) for x, y in case.loader])
    _refused("queries of 2 features", lambda: subject.fitted(case).variance(case.queries[:, :2]))


@check("rejects-nan")
def rejects_nan(subject: EstimatorUnderTest) -> None:
    """NaN among rows, targets, weights and queries."""
    case = any_case(subject)
    _refuses_loader(subject, case, "NaN among the rows", [(_spoiled(x), y) for x, y in case.loader])
    if case.kind != "classification":
        _refuses_loader(subject, case, "NaN among the targets", [(x, _spoiled(y)) for x, y in case.loader])
    model = subject.model(case)
    next(model.parameters()).detach().view(-1)[0] = float("nan")
    _refuses_loader(subject, case, "NaN among the weights", case.loader, model)
    _refused("NaN among the queries", lambda: subject.fitted(case).variance(_spoiled(case.queries)))


@check("rejects-one-shot-loader")
def rejects_one_shot_loader(subject: EstimatorUnderTest) -> None:
    """An iterator, which has no second pass, and a loader without rows."""
    case = any_case(subject)
    _refuses_loader(subject, case, "a one-shot iterator", iter(case.loader))
    _refuses_loader(subject, case, "a loader without rows", [])


@check("rejects-train-mode")
def rejects_train_mode(subject: EstimatorUnderTest) -> None:
    """A network whose dropout or batch statistics are in train mode."""
    case = any_case(subject)
    for layer in (nn.Dropout(0.3), nn.BatchNorm1d(case.x.shape[1]).to(case.device, case.dtype)):
        model = nn.Sequential(layer, subject.model(case)).train()
        _refuses_loader(subject, case, f"{type(layer).__name__} in train mode", case.loader, model)


@check("rejects-empty-query")
def rejects_empty_query(subject: EstimatorUnderTest) -> None:
    """No query rows at all."""
    case = any_case(subject)
    _refused("a query without rows", lambda: subject.fitted(case).variance(case.queries[:0]))


@check("notices-a-changed-model")
def notices_a_changed_model(subject: EstimatorUnderTest) -> None:
    """Weights that were changed after fit."""
    case = any_case(subject)
    model = subject.model(case)
    estimator = subject.fit(case, model)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    _refused("a query after a weight was changed", lambda: estimator.variance(case.queries))
