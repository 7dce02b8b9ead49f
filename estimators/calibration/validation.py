"""Validation rows, their predictions in float64, and the calibration of a prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from estimators.calibration.scores import Scorer
from estimators.data.training_data import TrainingData
from estimators.errors import DataError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.runtime.rng import preserved_random_state

__all__ = ["Predictor", "ValidationPredictions", "ValidationRows", "apply_calibration"]


class Predictor(Protocol):
    """A fitted estimator, of which calibration needs predictions only."""

    likelihood: Likelihood

    def predict_uncalibrated(self, x: PyTree) -> Prediction:
        """Return the prediction before calibration, in the units of the network's outputs."""
        ...


def apply_calibration(prediction: Prediction, variance_scale: float, noise_or_temperature: float) -> Prediction:
    """Return a prediction with its variance scaled, and its logits over a temperature or, in regression, σ multiplied.

    Args:
        prediction: the prediction as an estimator gave it.
        variance_scale: the factor of the epistemic variance.
        noise_or_temperature: the factor of σ in regression, else the softmax temperature.
    """
    if prediction.kind != "regression":
        return prediction.calibrated(variance_scale=variance_scale, softmax_temperature=noise_or_temperature)
    scaled = prediction.calibrated(variance_scale=variance_scale)
    assert scaled.aleatoric_variance is not None
    noise = scaled.aleatoric_variance * noise_or_temperature**2
    return replace(scaled, aleatoric_variance=noise, total_variance=scaled.epistemic_variance + noise)


@dataclass(frozen=True)
class ValidationPredictions:
    """Predictions of validation rows and their targets: one part, or several if the shapes of rows differ."""

    parts: tuple[tuple[Prediction, Tensor], ...]

    @classmethod
    def of(
        cls, predictions: Prediction | Sequence[Prediction], targets: Tensor | Sequence[Tensor]
    ) -> ValidationPredictions:
        """Join predictions of batches. Raises DataError if predictions and targets have different numbers of rows."""
        made = [predictions] if isinstance(predictions, Prediction) else list(predictions)
        known = [targets] if isinstance(targets, Tensor) else list(targets)
        if not made or len(made) != len(known) or any(len(p.mean) != len(y) for p, y in zip(made, known, strict=False)):
            raise DataError(
                "predictions and targets of the same rows",
                received=f"{[len(p.mean) for p in made]} predicted rows and {[len(y) for y in known]} targets",
                remedy="pass the targets of the predicted rows in the same order.",
            )
        parts = [(_to_float64(p), y.detach()) for p, y in zip(made, known, strict=True)]
        if len({(p.mean.shape[1:], y.shape[1:]) for p, y in parts}) == 1:
            parts = [(_concatenated([p for p, _ in parts]), torch.cat([y for _, y in parts]))]
        return cls(tuple((p, y.to(p.mean.dtype) if y.is_floating_point() else y) for p, y in parts))

    @property
    def kind(self) -> str:
        """The kind of the likelihood."""
        return self.parts[0][0].kind

    @property
    def finite(self) -> bool:
        """Whether all means and variances are finite."""
        return all(bool(torch.isfinite(t).all()) for p, _ in self.parts for t in (p.mean, p.epistemic_variance))

    @property
    def n_rows(self) -> int:
        """The number of rows in all parts."""
        return sum(len(y) for _, y in self.parts)

    @property
    def sigma_noise(self) -> float | None:
        """σ in regression, the geometric mean if each output has its own; else None."""
        noise = self.parts[0][0].aleatoric_variance
        if noise is None:
            return None
        first = noise[0]
        single = bool((first == first.flatten()[0]).all())
        return math.sqrt(float(first.flatten()[0])) if single else math.exp(0.5 * float(first.log().mean()))

    def score(self, scorer: Scorer, variance_scale: float, noise_or_temperature: float) -> float:
        """Return the score of the calibrated predictions."""
        return scorer([(apply_calibration(p, variance_scale, noise_or_temperature), y) for p, y in self.parts])


@dataclass(frozen=True)
class ValidationRows:
    """Rows that no network was trained on, read once if they are small enough to keep."""

    batches: TrainingData

    @classmethod
    def of(cls, loader: Iterable[Any]) -> ValidationRows:
        """Read a loader. Raises DataError if it is empty or can be iterated only once."""
        if isinstance(loader, Iterator):
            raise DataError(
                "a validation loader that can be iterated more than once",
                received=f"a one-shot {type(loader).__name__}",
                remedy="pass a DataLoader or a list of batches.",
            )
        with preserved_random_state():
            return cls(TrainingData.unchecked(loader, keep=True))

    def predicted(self, estimator: Predictor) -> ValidationPredictions:
        """Return the predictions of a fitted estimator with its default link approximation."""
        predictions, targets = [], []
        for batch in self.batches:
            prediction = estimator.predict_uncalibrated(batch.x)
            estimator.likelihood.check_targets(prediction.mean, batch.y)
            predictions.append(prediction)
            targets.append(batch.y)
        return ValidationPredictions.of(predictions, targets)


def _to_float64(prediction: Prediction) -> Prediction:
    """Detach and convert to `algebra_dtype`, since differences between scores are small."""
    dtype = algebra_dtype(prediction.mean.device)
    return replace(prediction, **{name: value.detach().to(dtype) for name, value in _tensors(prediction).items()})


def _concatenated(predictions: Sequence[Prediction]) -> Prediction:
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
