"""What `predict` returns: the predictive distribution of one batch of queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.option_checks import checked_number

__all__ = ["Prediction"]


@dataclass(frozen=True)
class Prediction:
    """Predictive distribution at M queries with C outputs, or with outputs (M, ...) of several dimensions.

    `mean` and `epistemic_variance` are of the network outputs (logits for classification), (M, C).
    Regression fills `aleatoric_variance` and `total_variance` (squared units of the target); classification and binary
    fill `probs` (M, C) and `entropy` (M,), in nats, or (M, C) for independent Bernoulli outputs; classes lie along
    `class_dim`.
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
    """Probit approximation (MacKay 1992): logits over √(1 + π/8 · variance), then the link."""
    scaled = mean / torch.sqrt(1 + math.pi / 8 * variance)
    probs = scaled.softmax(class_dim) if kind == "classification" else scaled.sigmoid()
    entropy = entropy_of(probs, kind=kind, class_dim=class_dim)
    return Prediction(mean, variance, kind, probs=probs, entropy=entropy, link_approx="probit", class_dim=class_dim)


def from_samples(mean: Tensor, variance: Tensor, samples: Tensor, *, kind: str, class_dim: int = -1) -> Prediction:
    """Monte-Carlo average of the link over logit samples (S, M, ...)."""
    of_sample = class_dim if class_dim < 0 else class_dim + 1
    probs = (samples.softmax(of_sample) if kind == "classification" else samples.sigmoid()).mean(0)
    made = {"probs": probs, "entropy": entropy_of(probs, kind=kind, class_dim=class_dim), "samples": samples}
    return Prediction(mean, variance, kind, link_approx="mc", class_dim=class_dim, **made)


def entropy_of(probs: Tensor, *, kind: str, class_dim: int) -> Tensor:
    """In nats: over the classes, or of each independent Bernoulli output."""
    entropy: Tensor = torch.special.entr(probs)
    return entropy.sum(class_dim) if kind == "classification" else entropy + torch.special.entr(1 - probs)
