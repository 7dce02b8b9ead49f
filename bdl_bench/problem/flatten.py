"""Predictions of several places a row, as flat rows (M, C): what records and metrics hold.

A row of text has a class at every token, an image one at every pixel. Here each place with a label is a row of its own,
and places without one (padding, void pixels, prompts, the last token of a causal model) are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from estimators.errors import DataError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.categorical import Sites
from estimators.likelihoods.prediction import Prediction

__all__ = ["flat_rows", "row_of_each"]


def flat_rows(
    prediction: Prediction, targets: Tensor | None, likelihood: Likelihood
) -> tuple[Prediction, Tensor | None]:
    """A prediction and its targets with one row a place that has a label.

    One class a row, outputs (B, C) and targets (B,): as they came. A class at each of several places, outputs
    (B, ..., C) or (B, C, ...) and labels of the places: (M, C) and (M,), M counting the places whose label is not
    ignored, in the order of rows and, in a row, of places. For causal models labels are shifted: what is predicted at t
    is judged by the token at t + 1. Numbers (regression, binary) of several dimensions: (B, C) and (B, C), C counting
    all outputs of a row.

    Args:
        prediction: of B rows, with outputs as the model gave them.
        targets: of the same B rows, as the likelihood has them; None: there are none, and every place counts.
        likelihood: of the problem.
    """
    if targets is not None and prediction.kind == "classification" and targets.is_floating_point():
        raise DataError(
            "class indices as the targets of rows that are scored; soft targets are for training rows",
            received=f"targets of shape {tuple(targets.shape)} and dtype {targets.dtype}",
            remedy="y.argmax(-1) in the validation and test loaders.",
        )
    places = _places(prediction) if targets is None else likelihood.given(targets)
    if isinstance(places, Sites):
        labels = None if targets is None else places.labels[places.kept]
        return _with(prediction, partial(_of_places, places)), labels
    return _with(prediction, _of_rows), targets.flatten(1) if targets is not None and targets.ndim > 1 else targets


def row_of_each(prediction: Prediction, targets: Tensor | None, likelihood: Likelihood) -> Tensor | None:
    """Return, for each of the M rows that `flat_rows` makes of B, the index of the one that it belongs to, (M,).

    None where flat rows are the rows. Arguments as of `flat_rows`.
    """
    places = _places(prediction) if targets is None else likelihood.given(targets)
    return places.kept.nonzero()[:, 0] if isinstance(places, Sites) else None


def _places(prediction: Prediction) -> Sites | None:
    """All places of a prediction of classes, where there are several a row."""
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


def _of_places(places: Sites, name: str, values: Tensor) -> Tensor:
    if name == "entropy":  # (B, ...), a number a place
        return values.flatten(1)[places.kept]
    if name == "samples":  # (S, B, ...)
        return places.by_site(values.flatten(2))[:, places.kept]
    return places.by_site(values.flatten(1))[places.kept]
