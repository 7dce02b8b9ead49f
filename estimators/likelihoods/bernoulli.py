"""Independent binary outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.errors import DataError
from estimators.likelihoods.base import Likelihood, Uniform, check_same_shape
from estimators.likelihoods.prediction import Prediction, from_logits, from_samples

__all__ = ["Bernoulli"]


class Bernoulli(Likelihood):
    """Independent Bernoulli outputs on logits f (B, C), y (B, C) in {0, 1}, or probabilities between (soft targets).

    −log p = Σ_c softplus(f_c) − y_c f_c;  with p = sigmoid f:  Λ = diag(p(1−p)).

    Example:
        >>> Bernoulli().nll(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]))
        tensor([0.6931, 0.6931])
    """

    kind = "binary"

    def __repr__(self) -> str:
        return "Bernoulli()"

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        return (F.softplus(f) - y.flatten(1).to(f.dtype) * f).sum(-1)

    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        return (F.softplus(f) - f_ref.sigmoid() * f).sum(-1)

    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.sigmoid()
        return (p * (1 - p)).sqrt() * v

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.sigmoid()
        return p * (1 - p) * v

    def sample_labels(self, f: Tensor, uniform: Uniform) -> Tensor:
        return (uniform(f.shape[-1]) < f.sigmoid()).to(f.dtype)

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        check_same_shape(f, y)
        strange = y[(y < 0) | (y > 1)] if y.dtype != torch.bool else y[:0]
        if strange.numel():
            raise DataError(
                "binary labels 0 or 1, or probabilities between them",
                received=f"a label {strange[0].item()}",
                remedy="map the labels to 0 and 1; an output without a label needs a likelihood of your own, whose "
                "given(y) and nll(f, y) leave it out.",
            )

    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        if samples is not None:
            return from_samples(mean, variance, samples, kind=self.kind)
        return from_logits(mean, variance, kind=self.kind)
