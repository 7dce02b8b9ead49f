"""Validation rows: what is predicted at them, joined and in float64, and what it becomes when it is calibrated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from estimators.data.training_data import TrainingData
from estimators.errors import DataError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.dtype import algebra_dtype
from estimators.runtime.rng import preserved_random_state
from estimators.tuning.scores import Scorer

__all__ = ["Predicted", "ValidationRows", "applied"]


def applied(prediction: Prediction, variance_scale: float, other: float) -> Prediction:
    """A prediction with its variance scaled, and its logits over a temperature or, in regression, σ times a factor."""
    if prediction.kind != "regression":
        return prediction.calibrated(variance_scale=variance_scale, softmax_temperature=other)
    scaled = prediction.calibrated(variance_scale=variance_scale)
    assert scaled.aleatoric_variance is not None
    noise = scaled.aleatoric_variance * other**2
    return replace(scaled, aleatoric_variance=noise, total_variance=scaled.epistemic_variance + noise)


@dataclass(frozen=True)
class Predicted:
    """Predictions and their targets, in one part, or in several where the shapes of rows differ."""

    parts: tuple[tuple[Prediction, Tensor], ...]

    @classmethod
    def of(cls, predictions: Prediction | Sequence[Prediction], targets: Tensor | Sequence[Tensor]) -> Predicted:
        """Joined where they can be. Errors: DataError where they do not belong together."""
        made = [predictions] if isinstance(predictions, Prediction) else list(predictions)
        known = [targets] if isinstance(targets, Tensor) else list(targets)
        if not made or len(made) != len(known) or any(len(p.mean) != len(y) for p, y in zip(made, known, strict=False)):
            raise DataError(
                "predictions, and as many targets",
                received=f"{[len(p.mean) for p in made]} predicted rows and {[len(y) for y in known]} targets",
                remedy="pass the targets of the rows that were predicted, in their order.",
            )
        parts = [(_wide(p), y.detach()) for p, y in zip(made, known, strict=True)]
        if len({(p.mean.shape[1:], y.shape[1:]) for p, y in parts}) == 1:
            parts = [(_joined([p for p, _ in parts]), torch.cat([y for _, y in parts]))]
        return cls(tuple((p, y.to(p.mean.dtype) if y.is_floating_point() else y) for p, y in parts))

    @property
    def kind(self) -> str:
        """Of the likelihood."""
        return self.parts[0][0].kind

    @property
    def finite(self) -> bool:
        """Whether means and variances are numbers."""
        return all(bool(torch.isfinite(t).all()) for p, _ in self.parts for t in (p.mean, p.epistemic_variance))

    @property
    def n_rows(self) -> int:
        """Rows in all parts."""
        return sum(len(y) for _, y in self.parts)

    @property
    def sigma_noise(self) -> float | None:
        """σ of a regression; where outputs have one each, their geometric mean."""
        noise = self.parts[0][0].aleatoric_variance
        if noise is None:
            return None
        first = noise[0]
        single = bool((first == first.flatten()[0]).all())
        return math.sqrt(float(first.flatten()[0])) if single else math.exp(0.5 * float(first.log().mean()))

    def score(self, scorer: Scorer, variance_scale: float, other: float) -> float:
        """Of the predictions as they are when calibrated so."""
        return scorer([(applied(prediction, variance_scale, other), y) for prediction, y in self.parts])


@dataclass(frozen=True)
class ValidationRows:
    """A loader of rows that no network was trained on, read once where they are small enough to keep."""

    batches: TrainingData

    @classmethod
    def of(cls, loader: Iterable[Any]) -> ValidationRows:
        """Errors: DataError for an empty loader, or one that can be read only once."""
        if isinstance(loader, Iterator):
            raise DataError(
                "a validation loader that can be iterated more than once",
                received=f"a one-shot {type(loader).__name__}",
                remedy="pass a DataLoader or a list of batches.",
            )
        with preserved_random_state():
            return cls(TrainingData.unchecked(loader, keep=True))

    def predicted(self, estimator: UncertaintyEstimator) -> Predicted:
        """What a fitted estimator predicts, by its own default link."""
        predictions, targets = [], []
        for batch in self.batches:
            prediction = estimator.predict(batch.x)
            estimator.likelihood.check_targets(prediction.mean, batch.y)
            predictions.append(prediction)
            targets.append(batch.y)
        return Predicted.of(predictions, targets)


def _wide(prediction: Prediction) -> Prediction:
    """Without a graph, in `algebra_dtype`: differences between scores are small."""
    dtype = algebra_dtype(prediction.mean.device)
    return replace(prediction, **{name: value.detach().to(dtype) for name, value in _tensors(prediction).items()})


def _joined(predictions: Sequence[Prediction]) -> Prediction:
    if len(predictions) == 1:
        return predictions[0]
    together: dict[str, Any] = {}
    for name in _tensors(predictions[0]):
        rows = int(name == "samples")  # (S, M, ...)
        together[name] = torch.cat([getattr(prediction, name) for prediction in predictions], dim=rows)
    return replace(predictions[0], **together)


def _tensors(prediction: Prediction) -> dict[str, Any]:
    values = {field.name: getattr(prediction, field.name) for field in fields(prediction)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
