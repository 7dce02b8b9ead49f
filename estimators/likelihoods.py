"""Likelihoods p(y | f): negative log-likelihood, its Hessian Λ in f, self-target loss and predictive distribution.

Conventions, shared by the three classes: f (B, C) are network outputs (logits for classification), y the targets,
Λ = ∂²(−log p)/∂f², S a root of it (S Sᵀ = Λ). Every `nll` is −log p with its constants, in nats, a row at a time;
sums over rows, never means. Scales live here and nowhere else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.errors import DataError, OptionError, UnsupportedError
from estimators.prediction import Prediction, from_logits, from_samples

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "resolve_likelihood"]


class Likelihood(ABC):
    """A likelihood with canonical link: Λ does not depend on y, and with E[y | f] as target the residual vanishes."""

    kind: ClassVar[str]

    @abstractmethod
    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """−log p(y | f), (B,)."""

    @abstractmethod
    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        """E[−log p(y | f)] over y ~ p(· | f_ref), up to a constant in f, (B,): training on one's own predictions."""

    @abstractmethod
    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        """S v for v (..., B, C): with v ~ N(0, I), score noise with covariance Λ."""

    @abstractmethod
    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Λ v for v (..., B, C)."""

    @abstractmethod
    def check_targets(self, f: Tensor, y: Tensor) -> None:
        """Raise DataError unless y can be the targets of outputs f."""

    @abstractmethod
    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        """Predictive distribution from output mean and variance (M, C); `samples` (S, M, C) for Monte-Carlo."""

    def hessian(self, f: Tensor) -> Tensor:
        """Λ, (B, C, C)."""
        return self.hessian_product(f, _identity_like(f)).permute(1, 2, 0)

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        """The diagonal of Λ, (B, C), without making Λ: Λ1 where Λ is diagonal."""
        return self.hessian_product(f, torch.ones_like(f))

    def hessian_sqrt(self, f: Tensor) -> Tensor:
        """S with S Sᵀ = Λ, (B, C, C)."""
        return self.root_product(f, _identity_like(f)).permute(1, 2, 0)


class Gaussian(Likelihood):
    """y ~ N(f, σ²), independent outputs; `sigma_noise` is a standard deviation: a number, or one per output (C,).

    −log p = Σ_c (y_c − f_c)² / 2σ_c² + log σ_c + ½ log 2π;  Λ = diag(1/σ²).
    """

    kind = "regression"

    def __init__(self, sigma_noise: float | Tensor = 1.0) -> None:
        sigma = torch.as_tensor(sigma_noise)
        if sigma.ndim > 1 or not bool(torch.isfinite(sigma).all()) or not bool((sigma > 0).all()):
            raise OptionError(
                "sigma_noise > 0: a standard deviation, a number or one per output",
                received=repr(sigma_noise),
                remedy="pass the standard deviation of the noise, for instance the RMSE on validation data.",
            )
        self.sigma_noise = sigma_noise

    def __repr__(self) -> str:
        return f"Gaussian(sigma_noise={self.sigma_noise})"

    def _sigma(self, f: Tensor) -> Tensor:
        sigma = torch.as_tensor(self.sigma_noise, dtype=f.dtype, device=f.device)
        if sigma.ndim == 1 and sigma.shape[0] != f.shape[-1]:
            raise DataError(
                f"one sigma_noise for each of the {f.shape[-1]} outputs",
                received=f"{sigma.shape[0]} of them",
                remedy="pass a single number or one per output.",
            )
        return sigma

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        sigma = self._sigma(f)
        constant = (torch.log(sigma) + 0.5 * math.log(2 * math.pi)).expand(f.shape[-1]).sum()
        return 0.5 * ((f - y) / sigma).square().sum(-1) + constant

    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        return 0.5 * ((f - f_ref) / self._sigma(f)).square().sum(-1)

    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        return v / self._sigma(f)

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        return v / self._sigma(f).square()

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        _check_same_shape(f, y)
        if y.dtype != f.dtype:
            raise DataError(
                f"targets of dtype {f.dtype}", received=f"{y.dtype}", remedy="convert: y.to(outputs.dtype)."
            )

    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        if samples is not None:
            raise UnsupportedError(
                'link_approx="probit" for regression, whose predictive is Gaussian in closed form',
                received='"mc"',
                remedy="leave link_approx at its default, or call sample(x, n_samples).",
            )
        noise = self._sigma(mean).square().expand_as(mean)
        return Prediction(mean, variance, self.kind, aleatoric_variance=noise, total_variance=variance + noise)


class Categorical(Likelihood):
    """Softmax cross-entropy on logits f (B, C), y (B,) class indices.

    −log p = logsumexp f − f_y;  with p = softmax f:  Λ = diag(p) − p pᵀ,  S = diag(√p) − p √pᵀ.
    """

    kind = "classification"

    def __repr__(self) -> str:
        return "Categorical()"

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y.long(), reduction="none")

    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        return -(f_ref.softmax(-1) * f.log_softmax(-1)).sum(-1)

    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.softmax(-1)
        root = p.sqrt()
        return root * v - p * (root * v).sum(-1, keepdim=True)

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p * v - p * (p * v).sum(-1, keepdim=True)

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p * (1 - p)

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
            raise DataError(
                "integer class indices",
                received=f"targets of dtype {y.dtype}",
                remedy='y.long() for indices, y.argmax(-1) for one-hot rows, or likelihood="regression"/"binary".',
            )
        if y.shape != f.shape[:1]:
            raise DataError(
                f"class indices of shape {tuple(f.shape[:1])} for outputs of shape {tuple(f.shape)}",
                received=f"shape {tuple(y.shape)}",
                remedy="one index a row: y.squeeze(-1), or y.argmax(-1) for one-hot rows.",
            )
        if y.numel() and (int(y.max()) >= f.shape[-1] or int(y.min()) < 0):
            raise DataError(
                f"class indices in 0..{f.shape[-1] - 1}, the network having {f.shape[-1]} outputs",
                received=f"indices from {int(y.min())} to {int(y.max())}",
                remedy="renumber the classes from 0, or give the network one output a class.",
            )

    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        if samples is not None:
            return from_samples(mean, variance, samples, kind=self.kind)
        return from_logits(mean, variance, kind=self.kind)


class Bernoulli(Likelihood):
    """Independent Bernoulli outputs on logits f (B, C), y (B, C) in {0, 1}.

    −log p = Σ_c softplus(f_c) − y_c f_c;  with p = sigmoid f:  Λ = diag(p(1−p)).
    """

    kind = "binary"

    def __repr__(self) -> str:
        return "Bernoulli()"

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        return (F.softplus(f) - y.to(f.dtype) * f).sum(-1)

    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        return (F.softplus(f) - f_ref.sigmoid() * f).sum(-1)

    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.sigmoid()
        return (p * (1 - p)).sqrt() * v

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.sigmoid()
        return p * (1 - p) * v

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        _check_same_shape(f, y)
        strange = y[(y != 0) & (y != 1)]
        if strange.numel():
            raise DataError(
                "binary labels 0 or 1", received=f"a label {strange[0].item()}", remedy="map the labels to 0 and 1."
            )

    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        if samples is not None:
            return from_samples(mean, variance, samples, kind=self.kind)
        return from_logits(mean, variance, kind=self.kind)


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood object of a field name: "regression", "classification" or "binary"."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    table: dict[str, type[Likelihood]] = {c.kind: c for c in (Gaussian, Categorical, Bernoulli)}
    if likelihood not in table:
        raise OptionError(
            f"a likelihood object or one of {sorted(table)}",
            received=repr(likelihood),
            remedy='for example likelihood="classification" or Gaussian(sigma_noise=0.5).',
        )
    return table[likelihood]()


def _check_same_shape(f: Tensor, y: Tensor) -> None:
    if y.shape != f.shape:
        raise DataError(
            f"targets of the shape of the outputs, {tuple(f.shape)}",
            received=f"{tuple(y.shape)}",
            remedy="reshape one of them, for instance y.unsqueeze(-1); nothing is broadcast silently.",
        )


def _identity_like(f: Tensor) -> Tensor:
    """(C, B, C): the C unit vectors, each for every row."""
    n_outputs = f.shape[-1]
    eye = torch.eye(n_outputs, dtype=f.dtype, device=f.device)
    return eye[:, None, :].expand(n_outputs, f.shape[0], n_outputs)
