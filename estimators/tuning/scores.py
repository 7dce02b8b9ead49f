"""What tuning minimises: a score of predictions and targets, lower is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.errors import DataError, OptionError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.base import check_same_shape
from estimators.likelihoods.categorical import Sites
from estimators.likelihoods.prediction import Prediction, log_odds_of, log_probs_of

__all__ = ["Parts", "Score", "Scorer", "negative_log_predictive"]

Score: TypeAlias = str | Callable[[Prediction, Tensor], float]
"""The word nll, or a function of a prediction of all rows and their targets."""
Parts: TypeAlias = Sequence[tuple[Prediction, Tensor]]


@dataclass(frozen=True)
class Scorer:
    """A score of the rows in some parts; nothing is carried over from one set of predictions to the next.

    "nll" is the mean of `negative_log_predictive` over all parts. A function of one's own sees all rows at once.
    """

    score: Score
    likelihood: Likelihood | None = None

    def __post_init__(self) -> None:
        if self.score != "nll" and not callable(self.score):
            raise OptionError(
                'score "nll" or a function of (prediction, targets)', received=repr(self.score), remedy='"nll".'
            )

    @property
    def name(self) -> str:
        """As records have it."""
        return "NLL" if isinstance(self.score, str) else getattr(self.score, "__name__", repr(self.score))

    def __call__(self, parts: Parts) -> float:
        """The score. Errors: DataError where it is NaN, or rows of several shapes cannot be joined for a function."""
        value = self._nll(parts) if isinstance(self.score, str) else self._own(self.score, parts)
        if value != value:
            raise DataError(
                "a score that is a number", received="NaN", remedy="look for NaN or Inf in predictions and targets."
            )
        return value

    def _nll(self, parts: Parts) -> float:
        rows = [negative_log_predictive(prediction, y, self.likelihood) for prediction, y in parts]
        return float(torch.cat(rows).mean())

    def _own(self, score: Callable[[Prediction, Tensor], float], parts: Parts) -> float:
        if len(parts) > 1:
            raise DataError(
                "rows of one shape for a score of one's own, which sees them joined",
                received=f"{len(parts)} parts of different shapes",
                remedy='score="nll", or pad the batches to one length.',
            )
        return float(score(*parts[0]))


def negative_log_predictive(prediction: Prediction, targets: Tensor, likelihood: Likelihood | None = None) -> Tensor:
    """−log p(y) of the predictive distribution, in nats, (n,).

    Regression: of N(mean, epistemic + noise), summed over outputs, a number a row. Classification: −log of the
    probability of the label, a number a row or, with several classes a row, one for each place with a label; which
    these are, and whether labels are shifted, `likelihood` says. Binary: a number an output.
    """
    if prediction.kind == "regression":
        return _gaussian(prediction, targets)
    if prediction.kind == "binary":
        log_odds = log_odds_of(prediction)
        check_same_shape(log_odds, targets)
        y = targets.to(log_odds.dtype)
        return -(_weighted(y, F.logsigmoid(log_odds)) + _weighted(1 - y, F.logsigmoid(-log_odds))).flatten()
    return _categorical(log_probs_of(prediction).movedim(prediction.class_dim, -1), targets, likelihood)


def _gaussian(prediction: Prediction, targets: Tensor) -> Tensor:
    assert prediction.total_variance is not None
    check_same_shape(prediction.mean, targets)
    variance = prediction.total_variance
    squared = (targets - prediction.mean).square()
    density: Tensor = 0.5 * (squared / variance + (2 * torch.pi * variance).log())
    return density.flatten(1).sum(1)


def _categorical(log_probs: Tensor, targets: Tensor, likelihood: Likelihood | None) -> Tensor:
    """Of log-probabilities (M, C) or (M, ..., C); soft targets have their shape."""
    if targets.is_floating_point() and targets.shape == log_probs.shape:
        return -_weighted(targets.to(log_probs.dtype), log_probs).sum(-1).flatten()
    expected = tuple(log_probs.shape[:-1])
    if targets.shape != expected:
        raise DataError(f"labels of shape {expected}", received=f"{tuple(targets.shape)}", remedy="one a prediction.")
    places = likelihood.given(targets) if likelihood is not None else None
    if not isinstance(places, Sites):
        return -log_probs.gather(-1, targets.long()[..., None]).flatten()
    kept, labels = places.kept, places.labels
    by_place = log_probs.reshape(*kept.shape, log_probs.shape[-1])
    return -by_place[kept].gather(-1, labels[kept].long()[:, None]).flatten()


def _weighted(weights: Tensor, logs: Tensor) -> Tensor:
    """weights · logs, 0 where a weight is 0, also for a logarithm of −∞."""
    return torch.where(weights == 0, 0.0, weights * logs)
