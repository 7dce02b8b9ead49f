"""What `predict` returns: the predictive distribution of one batch of queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.errors import UnsupportedError
from estimators.numerics.dtype import algebra_dtype
from estimators.option_checks import checked_number

__all__ = ["Prediction", "log_odds_of", "log_probs_of", "log_softmax"]


@dataclass(frozen=True)
class Prediction:
    """Predictive distribution at M queries with C outputs, or with outputs (M, ...) of several dimensions.

    `mean` and `epistemic_variance` are of the network outputs (logits for classification), (M, C).
    Regression fills `aleatoric_variance` and `total_variance` (squared units of the target); classification and binary
    fill `probs` (M, C) and `entropy` (M,), in nats, or (M, C) for independent Bernoulli outputs; classes lie along
    `class_dim`.
    `log_probs` (M, C) of classification are log p of each class, and `log_odds` (M, C) of binary log p/(1 − p) of each
    output, both in float64 whatever the dtype of the network (float32 on devices without float64). They hold what
    `probs` rounds away: a probability below 1e-45 is 0 in float32, and one above 1 − 6e-8 is 1. Score by them.
    `samples` (S, M, ...) are function samples of the outputs, where the prediction was made from any: of a Monte-Carlo
    link, or of the members of an ensemble, whose `mean` and `epistemic_variance` are theirs.
    """

    mean: Tensor
    epistemic_variance: Tensor
    kind: str
    aleatoric_variance: Tensor | None = None
    total_variance: Tensor | None = None
    probs: Tensor | None = None
    entropy: Tensor | None = None
    link_approx: str | None = None
    class_dim: int = -1
    samples: Tensor | None = None
    log_probs: Tensor | None = None
    log_odds: Tensor | None = None

    def calibrated(self, *, variance_scale: float = 1.0, softmax_temperature: float = 1.0) -> Prediction:
        """The same prediction with the epistemic variance times `variance_scale` and the logits over a temperature.

        Needs no refit. Probabilities are formed again by the link that made them: the probit approximation, or the
        average over samples, which become (mean + √variance_scale (samples − mean)) / softmax_temperature.

        Errors: OptionError for a scale < 0 or a temperature <= 0; UnsupportedError for a Monte-Carlo prediction without
        its samples, and for a temperature in regression.
        """
        variance_scale = checked_number("variance_scale", variance_scale, at_least=0, remedy="a non-negative scale.")
        softmax_temperature = checked_number(
            "softmax_temperature", softmax_temperature, above=0, remedy="a positive temperature."
        )
        variance, samples = self.epistemic_variance * variance_scale, self._spread(math.sqrt(variance_scale))
        if self.kind == "regression":
            return replace(self._calibrated_regression(variance, softmax_temperature), samples=samples)
        mean, variance = self.mean / softmax_temperature, variance / softmax_temperature**2
        samples = None if samples is None else samples / softmax_temperature
        if self.link_approx != "mc":
            made = from_logits(mean, variance, kind=self.kind, class_dim=self.class_dim)
            return replace(made, samples=samples)
        if samples is None:
            raise UnsupportedError(
                "the samples of a Monte-Carlo prediction, or one by the probit approximation",
                received='link_approx="mc" without samples',
                remedy='predict again, or with link_approx="probit".',
            )
        return from_samples(mean, variance, samples, kind=self.kind, class_dim=self.class_dim)

    def _spread(self, factor: float) -> Tensor | None:
        """The samples, `factor` times as far from the mean."""
        return None if self.samples is None else self.mean + factor * (self.samples - self.mean)

    def _calibrated_regression(self, variance: Tensor, softmax_temperature: float) -> Prediction:
        if softmax_temperature != 1.0:
            raise UnsupportedError(
                "softmax_temperature = 1 for regression",
                received=str(softmax_temperature),
                remedy="scale the variance with variance_scale instead.",
            )
        assert self.aleatoric_variance is not None
        return replace(self, epistemic_variance=variance, total_variance=variance + self.aleatoric_variance)


def from_logits(mean: Tensor, variance: Tensor, *, kind: str, class_dim: int = -1) -> Prediction:
    """Probit approximation (MacKay 1992): logits over √(1 + π/8 · variance), then the link, in float64."""
    wide_mean, wide_variance = _wide(mean), _wide(variance)
    scaled = wide_mean / torch.sqrt(1 + math.pi / 8 * wide_variance)
    logs = log_softmax(scaled, class_dim) if kind == "classification" else scaled
    return _with_logs(Prediction(mean, variance, kind, link_approx="probit", class_dim=class_dim), logs)


def from_samples(mean: Tensor, variance: Tensor, samples: Tensor, *, kind: str, class_dim: int = -1) -> Prediction:
    """Monte-Carlo average of the link over logit samples (S, M, ...), as a log-mean-exp in float64."""
    wide = _wide(samples)
    if kind == "classification":
        of_sample = class_dim if class_dim < 0 else class_dim + 1
        logs = log_softmax(log_softmax(wide, of_sample).logsumexp(0), class_dim)
    else:
        # Both averages have the same divisor S, which cancels.
        logs = F.logsigmoid(wide).logsumexp(0) - F.logsigmoid(-wide).logsumexp(0)
    made = Prediction(mean, variance, kind, link_approx="mc", class_dim=class_dim, samples=samples)
    return _with_logs(made, logs)


def log_softmax(logits: Tensor, dim: int) -> Tensor:
    """log p along `dim`, accurate for the largest class too.

    With f_m the largest logit, log p_m = −log(1 + Σ_{c≠m} exp(f_c − f_m)). torch's own sums the 1 with the rest, so
    that a log p_m between −1e-16 and 0 becomes 0 in float64.
    """
    shifted = logits - logits.amax(dim, keepdim=True)
    largest = logits.argmax(dim, keepdim=True)
    rest = shifted.exp().scatter(dim, largest, 0.0).sum(dim, keepdim=True)
    return shifted - rest.log1p()


def log_probs_of(prediction: Prediction) -> Tensor:
    """log p of each class of a classification; of a prediction without `log_probs`, the logarithm of `probs`."""
    if prediction.log_probs is not None:
        return prediction.log_probs
    assert prediction.probs is not None
    return _wide(prediction.probs).log()


def log_odds_of(prediction: Prediction) -> Tensor:
    """log p/(1 − p) of each Bernoulli output; of a prediction without `log_odds`, that of `probs`."""
    if prediction.log_odds is not None:
        return prediction.log_odds
    assert prediction.probs is not None
    return _wide(prediction.probs).logit()


def _with_logs(prediction: Prediction, logs: Tensor) -> Prediction:
    """The prediction with probabilities and entropy of these log-probabilities, or log-odds for binary."""
    dtype = prediction.mean.dtype
    if prediction.kind == "classification":
        entropy = _minus_p_log_p(logs).sum(prediction.class_dim)
        return replace(prediction, log_probs=logs, probs=logs.exp().to(dtype), entropy=entropy.to(dtype))
    entropy = _minus_p_log_p(F.logsigmoid(logs)) + _minus_p_log_p(F.logsigmoid(-logs))
    return replace(prediction, log_odds=logs, probs=logs.sigmoid().to(dtype), entropy=entropy.to(dtype))


def _minus_p_log_p(log_p: Tensor) -> Tensor:
    """−p log p, 0 where p is."""
    p = log_p.exp()
    return torch.where(p > 0, -p * log_p, 0.0)


def _wide(values: Tensor) -> Tensor:
    return values.to(algebra_dtype(values.device))
