"""Likelihoods p(y | f): negative log-likelihood, its Hessian Λ in f, self-target loss and predictive distribution.

Conventions, shared by the three classes: f (B, C) are network outputs (logits for classification), y the targets,
Λ = ∂²(−log p)/∂f², S a root of it (S Sᵀ = Λ). Every `nll` is −log p with its constants, in nats, a row at a time;
sums over rows, never means. Scales live here and nowhere else. Where a row has outputs of several dimensions, f is flat
(C counts them all); `check_targets` and `predict` alone see the shape that the model gave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from estimators.errors import DataError
from estimators.likelihoods.prediction import Prediction

__all__ = ["Likelihood", "check_same_shape"]


class Likelihood(ABC):
    """A likelihood with canonical link: Λ does not depend on y, and with E[y | f] as target the residual vanishes."""

    kind: ClassVar[str]

    def __repr__(self) -> str:
        """The class with its attributes: the same text for the same values, also in another process."""
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({listed})"

    def given(self, y: Tensor) -> Likelihood:  # noqa: ARG002
        """The same for the rows with targets y: it knows which of their outputs have one. Here, all."""
        return self

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

    def curvature_ratio(self, other: Likelihood) -> float | None:
        """s where Λ is s times that of `other` at any f; None where there is no such number."""
        return 1.0 if self is other else None

    def hessian(self, f: Tensor) -> Tensor:
        """Λ, (B, C, C)."""
        return self.hessian_product(f, _identity_like(f)).permute(1, 2, 0)

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        """The diagonal of Λ, (B, C), without making Λ: Λ1 where Λ is diagonal."""
        return self.hessian_product(f, torch.ones_like(f))

    def hessian_sum(self, f: Tensor) -> Tensor:
        """Σₙ Λₙ, (C, C), a few rows at a time: with 1000 classes one Λ is a million numbers."""
        total = f.new_zeros(f.shape[-1], f.shape[-1])
        for part in f.split(max(1, 2**22 // f.shape[-1] ** 2)):
            total += self.hessian(part).sum(0)
        return total

    def hessian_sqrt(self, f: Tensor) -> Tensor:
        """S with S Sᵀ = Λ, (B, C, C)."""
        return self.root_product(f, _identity_like(f)).permute(1, 2, 0)


def check_same_shape(f: Tensor, y: Tensor) -> None:
    """Refuse targets of another shape than the outputs."""
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
