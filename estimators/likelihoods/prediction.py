"""The result of `predict`: the predictive distribution at a batch of queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.errors import UnsupportedError
from estimators.numerics.dtype import to_algebra_dtype
from estimators.option_checks import checked_number

__all__ = [
    "BRIDGES",
    "LINKS",
    "MONTE_CARLO",
    "Prediction",
    "from_covariance",
    "from_logits",
    "log_odds_of",
    "log_probs_of",
    "log_softmax",
    "with_logs",
]

BRIDGES = ("bridge", "bridge_norm")
"""Names of the Laplace bridge, without and with the correction of the norm."""
MONTE_CARLO = ("mc", "mc_independent")
"""Names of the average over function samples, with and without the correlations between them."""
LINKS = ("probit", *MONTE_CARLO, *BRIDGES)
"""All values of `link_approx`."""


@dataclass(frozen=True, repr=False)
class Prediction:
    """Predictive distribution at M queries with C outputs, or with outputs (M, ...) of several dimensions.

    `log_probs` and `log_odds` are in float64 for any dtype of the network (float32 on devices without float64). Compute
    scores from them: a probability below 1e-45 rounds to 0 in float32, and one above 1 − 6e-8 rounds to 1.

    Attributes:
        mean: mean of the network outputs (logits for classification), (M, C); in regression of the target.
        epistemic_variance: variance of the network outputs, (M, C); in regression in squared units of the target.
        kind: "regression", "classification" or "binary".
        aleatoric_variance: noise variance (M, C) in squared units of the target; regression only.
        total_variance: epistemic plus aleatoric variance (M, C); regression only.
        probs: probabilities of the classes, or of each Bernoulli output, (M, C).
        entropy: entropy in nats, (M,), or (M, C) for Bernoulli outputs.
        link_approx: "probit", "mc", "mc_independent", "bridge" or "bridge_norm", the approximation that made `probs`.
        class_dim: the dimension of the classes.
        samples: function samples (S, M, ...) if the prediction was made from samples or from members of an ensemble.
        log_probs: log p of each class, (M, C); classification only.
        log_odds: log p/(1 − p) of each output, (M, C); binary only.
        covariance: epistemic covariance of the outputs (M, C, C), if a bridge was made from it.
        concentration: α of the Dirichlet distribution of the probabilities, (M, C), by a bridge only; infinite after a
            calibration with a variance scale of 0.
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
    covariance: Tensor | None = None
    concentration: Tensor | None = None

    def __repr__(self) -> str:
        """Return the kind, the shape and averages, not the tensors."""
        return f"Prediction({self.kind}, {len(self.mean)} rows; {', '.join(self._summary())})"

    def _summary(self) -> Iterator[str]:
        yield f"mean {tuple(self.mean.shape)}"
        if not self.mean.numel():
            return
        if self.kind == "regression":
            yield f"average std {float(self.std.mean()):.4g}"
        yield f"average epistemic_variance {float(self.epistemic_variance.mean()):.4g}"
        if self.entropy is not None:
            yield f"average entropy {float(self.entropy.mean()):.4g} nats"
        if self.link_approx is not None:
            yield f"link_approx={self.link_approx!r}"
        if self.samples is not None:
            yield f"{len(self.samples)} samples"

    @property
    def std(self) -> Tensor:
        """The predictive standard deviation, (M, C).

        In regression it is that of the target, √total_variance, in its units. Otherwise it is that of the network
        outputs (logits), √epistemic_variance.

        Returns:
            The standard deviation, in the shape of `mean`.

        Example:
            >>> from estimators import Gaussian
            >>> mean, variance = torch.zeros(1, 2), torch.tensor([[0.0, 1.44]])
            >>> Gaussian(sigma_noise=0.5).predict(mean, variance, None).std
            tensor([[0.5000, 1.3000]])
        """
        return (self.epistemic_variance if self.total_variance is None else self.total_variance).sqrt()

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the central interval that contains the target with a probability, for the Gaussian predictive.

        Args:
            level: the probability, in (0, 1).

        Returns:
            Lower and upper ends, (M, C) each, in units of the target: mean ± z std with z = Φ⁻¹((1 + level) / 2).

        Raises:
            OptionError: for a level outside (0, 1).
            UnsupportedError: unless the prediction is of regression.

        Example:
            >>> from estimators import Gaussian
            >>> made = Gaussian(sigma_noise=0.5).predict(torch.zeros(1, 1), torch.zeros(1, 1), None)
            >>> made.interval(0.95)
            (tensor([[-0.9800]]), tensor([[0.9800]]))
        """
        level = checked_number("level", level, above=0, below=1, remedy="0.95.")
        if self.kind != "regression":
            raise UnsupportedError(
                "a regression prediction, whose target has an interval",
                received=f"a {self.kind} prediction",
                remedy="use probs, entropy, or mean ± z std for the logits.",
            )
        half = NormalDist().inv_cdf((1 + level) / 2) * self.std
        return self.mean - half, self.mean + half

    def rescaled(self, *, shift: Tensor | float, scale: Tensor | float) -> Prediction:
        """Return the prediction of shift + scale · y, such as the original target of a standardised one.

        Args:
            shift: a number or a tensor that broadcasts to the outputs of a row, in the new units.
            scale: the same, in new units per unit of y.

        Returns:
            A new prediction.

        Raises:
            UnsupportedError: unless the prediction is of regression.
        """
        if self.kind != "regression":
            raise UnsupportedError(
                "a regression prediction, whose target has units",
                received=f"a {self.kind} prediction",
                remedy="use the prediction as it is.",
            )
        assert self.aleatoric_variance is not None
        assert self.total_variance is not None
        square = scale**2
        return replace(
            self,
            mean=shift + scale * self.mean,
            epistemic_variance=square * self.epistemic_variance,
            aleatoric_variance=square * self.aleatoric_variance,
            total_variance=square * self.total_variance,
            samples=None if self.samples is None else shift + scale * self.samples,
        )

    def calibrated(self, *, variance_scale: float = 1.0, softmax_temperature: float = 1.0) -> Prediction:
        """Return the prediction with a rescaled epistemic variance and with logits divided by a temperature.

        No refit is needed. The link that made the probabilities is applied again: the probit approximation, or the
        average over samples, which become (mean + √variance_scale (samples − mean)) / softmax_temperature. Without
        variance every link is the softmax or the sigmoid of the mean; a bridge then has infinite concentrations.

        Args:
            variance_scale: factor >= 0 of the epistemic variance.
            softmax_temperature: temperature > 0 by which logits are divided; 1 for regression.

        Returns:
            A new prediction.

        Raises:
            OptionError: a scale < 0 or a temperature <= 0.
            UnsupportedError: a Monte-Carlo prediction without its samples, or a temperature in regression.
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
        if self.covariance is not None and self.link_approx is not None and self.link_approx in BRIDGES:
            covariance = self.covariance * (variance_scale / softmax_temperature**2)
            if bool(covariance.any()):
                return from_covariance(mean, covariance, link_approx=self.link_approx)
            made = from_logits(mean, variance, kind=self.kind, class_dim=self.class_dim)
            point = torch.full_like(to_algebra_dtype(mean), math.inf)  # the Dirichlet has all its mass at one point
            return replace(made, link_approx=self.link_approx, covariance=covariance, concentration=point)
        if self.link_approx not in MONTE_CARLO:
            made = from_logits(mean, variance, kind=self.kind, class_dim=self.class_dim)
            return replace(made, samples=samples)
        if samples is None:
            raise UnsupportedError(
                "the samples of a Monte-Carlo prediction, or one by the probit approximation",
                received=f'link_approx="{self.link_approx}" without samples',
                remedy='predict again, or with link_approx="probit".',
            )
        made = from_samples(mean, variance, samples, kind=self.kind, class_dim=self.class_dim)
        return replace(made, link_approx=self.link_approx)

    def _spread(self, factor: float) -> Tensor | None:
        """Return the samples, `factor` times as far from the mean."""
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
    """Return the prediction by the probit approximation (MacKay 1992): logits over √(1 + π/8 · variance)."""
    scaled = to_algebra_dtype(mean) / torch.sqrt(1 + math.pi / 8 * to_algebra_dtype(variance))
    logs = log_softmax(scaled, class_dim) if kind == "classification" else scaled
    return with_logs(Prediction(mean, variance, kind, link_approx="probit", class_dim=class_dim), logs)


def from_samples(mean: Tensor, variance: Tensor, samples: Tensor, *, kind: str, class_dim: int = -1) -> Prediction:
    """Return the prediction by a Monte-Carlo average of the link over logit samples (S, M, ...), in float64."""
    wide = to_algebra_dtype(samples)
    if kind == "classification":
        of_sample = class_dim if class_dim < 0 else class_dim + 1
        logs = log_softmax(log_softmax(wide, of_sample).logsumexp(0), class_dim)
    else:
        # Both averages have the same divisor S, which cancels.
        logs = F.logsigmoid(wide).logsumexp(0) - F.logsigmoid(-wide).logsumexp(0)
    made = Prediction(mean, variance, kind, link_approx="mc", class_dim=class_dim, samples=samples)
    return with_logs(made, logs)


def from_covariance(mean: Tensor, covariance: Tensor, *, link_approx: str) -> Prediction:
    """Return the prediction by the Laplace bridge: the Dirichlet whose logarithms are nearly N(mean, covariance).

    Source: MacKay 1998; Hobbhahn et al. 2022, "Fast predictive uncertainty for classification with Bayesian deep
    networks", equations 7 and 8, and the norm correction of its appendix D ("bridge_norm").

    Args:
        mean: logits μ (M, C).
        covariance: Σ (M, C, C).
        link_approx: "bridge", or "bridge_norm", which rescales μ and Σ so that the average variance is √(C/2).

    Raises:
        UnsupportedError: for a covariance without variance between the classes, such as that of MAP.
    """
    mu, sigma = to_algebra_dtype(mean), to_algebra_dtype(covariance)
    n = mu.shape[-1]
    rows, total = sigma.sum(-1), sigma.sum((-1, -2))
    mu = mu - rows * (mu.sum(-1) / total)[:, None]  # conditioned on Σ_c f_c = 0, as the softmax is invariant to it
    variance = sigma.diagonal(dim1=-2, dim2=-1) - rows.square() / total[:, None]
    if not bool((variance > 0).all() & (total > 0).all()):
        smallest = torch.where(total[:, None] > 0, variance, total[:, None])  # no division by a total of 0
        raise UnsupportedError(
            f'a positive variance between the classes for link_approx="{link_approx}"',
            received=f"a smallest variance of {float(smallest.min()):.3g}",
            remedy='link_approx="probit".',
        )
    if link_approx == "bridge_norm":
        size = variance.mean(-1, keepdim=True) / math.sqrt(n / 2)
        mu, variance = mu / size.sqrt(), variance / size
    # α_c = (1 − 2/C + exp(μ_c) Σ_k exp(−μ_k) / C²) / Σ_cc
    of_mean = mu + (-mu).logsumexp(-1, keepdim=True) - 2 * math.log(n)
    logs = of_mean if n == 2 else torch.logaddexp(of_mean, torch.full_like(mu, math.log1p(-2 / n)))
    logs = logs - variance.log()
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    made = with_logs(Prediction(mean, diagonal, "classification", link_approx=link_approx), log_softmax(logs, -1))
    return replace(made, covariance=covariance, concentration=logs.exp())


def log_softmax(logits: Tensor, dim: int) -> Tensor:
    """Return log p along `dim`, accurate for the largest class too.

    With f_m the largest logit, log p_m = −log(1 + Σ_{c≠m} exp(f_c − f_m)). torch's log_softmax adds
    the 1 to the rest, so that a log p_m between −1e-16 and 0 becomes 0 in float64.
    """
    shifted = logits - logits.amax(dim, keepdim=True)
    largest = logits.argmax(dim, keepdim=True)
    rest = shifted.exp().scatter(dim, largest, 0.0).sum(dim, keepdim=True)
    return shifted - rest.log1p()


def log_probs_of(prediction: Prediction) -> Tensor:
    """Return log p of each class; the logarithm of `probs` if the prediction has no `log_probs`."""
    if prediction.log_probs is not None:
        return prediction.log_probs
    assert prediction.probs is not None
    return to_algebra_dtype(prediction.probs).log()


def log_odds_of(prediction: Prediction) -> Tensor:
    """Return log p/(1 − p) of each Bernoulli output; computed from `probs` if the prediction has no `log_odds`."""
    if prediction.log_odds is not None:
        return prediction.log_odds
    assert prediction.probs is not None
    return to_algebra_dtype(prediction.probs).logit()


def with_logs(prediction: Prediction, logs: Tensor) -> Prediction:
    """Return the prediction with probabilities and entropy of these log-probabilities, or log-odds for binary."""
    dtype = prediction.mean.dtype
    if prediction.kind == "classification":
        entropy = _minus_p_log_p(logs).sum(prediction.class_dim)
        return replace(prediction, log_probs=logs, probs=logs.exp().to(dtype), entropy=entropy.to(dtype))
    entropy = _minus_p_log_p(F.logsigmoid(logs)) + _minus_p_log_p(F.logsigmoid(-logs))
    return replace(prediction, log_odds=logs, probs=logs.sigmoid().to(dtype), entropy=entropy.to(dtype))


def _minus_p_log_p(log_p: Tensor) -> Tensor:
    """Return −p log p, with 0 for p = 0."""
    p = log_p.exp()
    return torch.where(p > 0, -p * log_p, 0.0)
