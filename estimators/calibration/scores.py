"""The scores that tuning minimises: functions of predictions and targets, lower is better."""

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

__all__ = ["Parts", "Score", "Scorer", "check_none_missing", "negative_log_predictive"]

Score: TypeAlias = str | Callable[[Prediction, Tensor], float]
"""The string "nll", or a function of a prediction of all rows and their targets."""
Parts: TypeAlias = Sequence[tuple[Prediction, Tensor]]


@dataclass(frozen=True)
class Scorer:
    """A score of predictions that may come in several parts, one per shape of the rows.

    "nll" is the mean of `negative_log_predictive` over all parts. A custom function receives all rows at once.
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
        """The name of the score in records."""
        return "NLL" if isinstance(self.score, str) else getattr(self.score, "__name__", repr(self.score))

    def __call__(self, parts: Parts) -> float:
        """Return the score. Raises DataError if it is NaN, or if a custom score has rows of several shapes."""
        value = self._nll(parts) if isinstance(self.score, str) else self._custom(self.score, parts)
        if value != value:
            raise DataError(
                "a score that is a number", received="NaN", remedy="check predictions and targets for NaN and Inf."
            )
        return value

    def _nll(self, parts: Parts) -> float:
        rows = [negative_log_predictive(prediction, y, self.likelihood) for prediction, y in parts]
        return float(torch.cat(rows).mean())

    def _custom(self, score: Callable[[Prediction, Tensor], float], parts: Parts) -> float:
        if len(parts) > 1:
            raise DataError(
                "rows of one shape for a custom score, which receives all rows at once",
                received=f"{len(parts)} parts of different shapes",
                remedy='score="nll", or pad the batches to one length.',
            )
        return float(score(*parts[0]))


def negative_log_predictive(prediction: Prediction, targets: Tensor, likelihood: Likelihood | None = None) -> Tensor:
    """Return −log p(y) of the predictive distribution, in nats, (n,).

    Regression uses N(mean, epistemic + noise variance), summed over outputs: one number per row. Classification uses
    the probability of the label: one number per row or, with several classes per row, per position with a label;
    `likelihood` says which labels count and whether they are shifted. Binary gives one number per output.

    Raises:
        DataError: if the shapes of predictions and targets differ, or if some targets of a regression or of binary
            outputs are missing, by `likelihood.given`.
    """
    check_none_missing(targets, likelihood, kind=prediction.kind)
    if prediction.kind == "regression":
        return _gaussian(prediction, targets)
    if prediction.kind == "binary":
        log_odds = log_odds_of(prediction)
        check_same_shape(log_odds, targets)
        y = targets.to(log_odds.dtype)
        return -(_weighted(y, F.logsigmoid(log_odds)) + _weighted(1 - y, F.logsigmoid(-log_odds))).flatten()
    return _categorical(log_probs_of(prediction).movedim(prediction.class_dim, -1), targets, likelihood)


def check_none_missing(targets: Tensor, likelihood: Likelihood | None, *, kind: str) -> None:
    """Check that rows to score have a target for every output, since scores would count missing ones as observed.

    Args:
        targets: targets (B, ...).
        likelihood: the likelihood; None if it is not known, and nothing can be checked.
        kind: that of the prediction. Scores of a "classification" know which labels count, so that nothing is checked.

    Raises:
        DataError: if a custom likelihood of another kind leaves out some targets, by `given`.
    """
    if kind != "classification" and likelihood is not None and likelihood.given(targets) is not likelihood:
        raise DataError(
            "rows to score with a target for every output",
            received=f"targets of which {type(likelihood).__name__}.given leaves some out",
            remedy="validation and test rows without missing targets; `given(y)` returns the likelihood itself if none "
            "is missing.",
        )


def _gaussian(prediction: Prediction, targets: Tensor) -> Tensor:
    assert prediction.total_variance is not None
    check_same_shape(prediction.mean, targets)
    variance = prediction.total_variance
    squared = (targets - prediction.mean).square()
    density: Tensor = 0.5 * (squared / variance + (2 * torch.pi * variance).log())
    return density.flatten(1).sum(1)


def _categorical(log_probs: Tensor, targets: Tensor, likelihood: Likelihood | None) -> Tensor:
    """Return −log p of labels from log-probabilities (M, C) or (M, ..., C); soft targets have the same shape."""
    if targets.is_floating_point() and targets.shape == log_probs.shape:
        return -_weighted(targets.to(log_probs.dtype), log_probs).sum(-1).flatten()
    expected = tuple(log_probs.shape[:-1])
    if targets.shape != expected:
        raise DataError(
            f"labels of shape {expected}", received=f"{tuple(targets.shape)}", remedy="pass one label per prediction."
        )
    sites = likelihood.given(targets) if likelihood is not None else None
    if not isinstance(sites, Sites):
        return -log_probs.gather(-1, targets.long()[..., None]).flatten()
    kept, labels = sites.kept, sites.labels
    per_position = log_probs.reshape(*kept.shape, log_probs.shape[-1])
    return -per_position[kept].gather(-1, labels[kept].long()[:, None]).flatten()


def _weighted(weights: Tensor, logs: Tensor) -> Tensor:
    """Return weights · logs, with 0 · (−∞) = 0."""
    return torch.where(weights == 0, 0.0, weights * logs)
