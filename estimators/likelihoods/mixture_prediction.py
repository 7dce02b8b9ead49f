"""The predictive distribution of a mixture: probabilities are averaged over its components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.likelihoods.prediction import Prediction, from_logits, log_softmax, with_logs
from estimators.option_checks import checked_number

__all__ = ["MixturePrediction", "mixture_of_gaussians"]


@dataclass(frozen=True, repr=False)
class MixturePrediction(Prediction):
    """Class probabilities of a mixture of Gaussians over logits, p = Σ_k w_k p_k with the probit link in each.

    Attributes:
        component_means: logits μ_k, (M, K, C).
        component_variances: variances of the logits, (M, K, C).
        component_weights: w_k, which sum to 1.
    """

    component_means: Tensor | None = None
    component_variances: Tensor | None = None
    component_weights: tuple[float, ...] = ()

    def calibrated(self, *, variance_scale: float = 1.0, softmax_temperature: float = 1.0) -> Prediction:
        """Return the prediction with a rescaled epistemic variance and with logits divided by a temperature.

        The whole covariance is rescaled: component k has the mean μ + √variance_scale (μ_k − μ) and variance_scale
        times its variance, so that the variance of the mixture is variance_scale times as large.

        Args:
            variance_scale: factor >= 0 of the epistemic variance.
            softmax_temperature: temperature > 0 by which logits are divided.

        Returns:
            A new prediction.

        Raises:
            OptionError: a scale < 0 or a temperature <= 0.
        """
        scale = checked_number("variance_scale", variance_scale, at_least=0, remedy="a non-negative scale.")
        t = checked_number("softmax_temperature", softmax_temperature, above=0, remedy="a positive temperature.")
        assert self.component_means is not None
        assert self.component_variances is not None
        centre = self.mean[:, None]
        means = (centre + scale**0.5 * (self.component_means - centre)) / t
        variances = self.component_variances * (scale / t**2)
        return mixture_of_gaussians(means, variances, self.component_weights, kind=self.kind, class_dim=self.class_dim)


def mixture_of_gaussians(
    means: Tensor, variances: Tensor, weights: Sequence[float], *, kind: str, class_dim: int = -1
) -> MixturePrediction:
    """Return the prediction of a mixture of Gaussians over logits.

    Its mean and variance follow from the laws of total expectation and variance,

        μ = Σ_k w_k μ_k        v = Σ_k w_k (v_k + (μ_k − μ)²)

    Args:
        means: logits μ_k of the components, (M, K, C) or (M, K, ...).
        variances: their variances, of the same shape.
        weights: w_k, which sum to 1.
        kind: "classification" or "binary".
        class_dim: the dimension of the classes in the outputs (M, ...) of a component.
    """
    w = means.new_tensor(list(weights)).reshape(-1, *[1] * (means.ndim - 2))
    mean = (w * means).sum(1)
    variance = (w * (variances + (means - mean[:, None]).square())).sum(1)
    parts = [
        from_logits(m, v, kind=kind, class_dim=class_dim)
        for m, v in zip(means.unbind(1), variances.unbind(1), strict=True)
    ]
    made: Prediction = MixturePrediction(
        mean,
        variance,
        kind,
        link_approx="probit",
        class_dim=class_dim,
        component_means=means,
        component_variances=variances,
        component_weights=tuple(float(weight) for weight in weights),
    )
    made = with_logs(made, _averaged(parts, weights, kind, class_dim))
    assert isinstance(made, MixturePrediction)
    return made


def _averaged(parts: Sequence[Prediction], weights: Sequence[float], kind: str, class_dim: int) -> Tensor:
    """Return log Σ_k w_k p_k of each class, or the log-odds of Σ_k w_k p_k, in float64."""

    def log_mean(logs: Sequence[Tensor]) -> Tensor:
        wide = torch.stack(list(logs))
        log_w = wide.new_tensor(list(weights)).log().reshape(-1, *[1] * (wide.ndim - 1))
        return (wide + log_w).logsumexp(0)

    if kind == "classification":
        logs = log_mean([part.log_probs for part in parts if part.log_probs is not None])
        return log_softmax(logs, class_dim)
    odds = [part.log_odds for part in parts if part.log_odds is not None]
    return log_mean([F.logsigmoid(o) for o in odds]) - log_mean([F.logsigmoid(-o) for o in odds])
