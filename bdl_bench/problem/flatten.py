"""Predictions at several positions per row as flat rows (M, C), which records and metrics use.

A text has a class at every token, an image one at every pixel. Each position with a label becomes one row. Positions
without a label (padding, void pixels, prompts, the last token of a causal model) are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from estimators.calibration.scores import check_none_missing
from estimators.errors import DataError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.categorical import Sites
from estimators.likelihoods.prediction import Prediction

__all__ = ["flat_rows", "row_of_each"]


def flat_rows(
    prediction: Prediction, targets: Tensor | None, likelihood: Likelihood
) -> tuple[Prediction, Tensor | None]:
    """Return a prediction and its targets with one row per labelled position.

    One class per row, outputs (B, C) and targets (B,), is unchanged. A class at each of several positions, outputs
    (B, ..., C) or (B, C, ...), becomes (M, C) and (M,): M is the number of positions whose label is not ignored, in the
    order of rows and of positions in a row. For causal models labels are shifted: the prediction at t is compared with
    the token at t + 1. Regression and binary outputs of several dimensions become (B, C), C counting all outputs.

    Raises:
        DataError: for soft targets of classes, and for targets of other kinds that `likelihood.given` leaves out.
    """
    if targets is not None:
        check_none_missing(targets, likelihood, kind=prediction.kind)
    if targets is not None and prediction.kind == "classification" and targets.is_floating_point():
        raise DataError(
            "class indices as the targets of scored rows; soft targets are for training rows",
            received=f"targets of shape {tuple(targets.shape)} and dtype {targets.dtype}",
            remedy="y.argmax(-1) in the validation and test loaders.",
        )
    positions = _positions(prediction) if targets is None else likelihood.given(targets)
    if isinstance(positions, Sites):
        labels = None if targets is None else positions.labels[positions.kept]
        return _with(prediction, partial(_at_positions, positions)), labels
    return _with(prediction, _of_rows), targets.flatten(1) if targets is not None and targets.ndim > 1 else targets


def row_of_each(prediction: Prediction, targets: Tensor | None, likelihood: Likelihood) -> Tensor | None:
    """Return the original row of each of the M rows of `flat_rows`, (M,); None if rows are unchanged."""
    positions = _positions(prediction) if targets is None else likelihood.given(targets)
    return positions.kept.nonzero()[:, 0] if isinstance(positions, Sites) else None


def _positions(prediction: Prediction) -> Sites | None:
    """Return all positions of a prediction of classes; None for one per row."""
    shape = prediction.mean.movedim(prediction.class_dim, -1).shape[:-1]
    if prediction.kind != "classification" or len(shape) == 1:
        return None
    every = prediction.mean.new_zeros(shape, dtype=torch.long).flatten(1)
    return Sites(every, classes_first=prediction.class_dim == 1, ignored=-1)


def _with(prediction: Prediction, flat: Callable[[str, Tensor], Tensor]) -> Prediction:
    values = {field.name: getattr(prediction, field.name) for field in fields(prediction)}
    changed: dict[str, Any] = {name: flat(name, value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(prediction, **changed, class_dim=-1)


def _of_rows(name: str, values: Tensor) -> Tensor:
    if name == "samples":  # (S, B, ...)
        return values.flatten(2)
    return values.flatten(1) if values.ndim > 1 else values


def _at_positions(positions: Sites, name: str, values: Tensor) -> Tensor:
    if name == "entropy":  # (B, ...), one number per position
        return values.reshape(positions.kept.shape)[positions.kept]
    if name == "samples":  # (S, B, ...)
        return positions.by_site(values.flatten(2))[:, positions.kept]
    return positions.by_site(values.flatten(1))[positions.kept]
