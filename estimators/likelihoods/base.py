"""Likelihoods p(y | f): negative log-likelihood, its Hessian Λ in f, self-target loss and predictive distribution.

Conventions, shared by the three classes: f (B, C) are network outputs (logits for classification), y the targets,
Λ = ∂²(−log p)/∂f², S a root of it (S Sᵀ = Λ). Every `nll` is −log p with its constants, in nats per row;
sums go over rows, never means. Noise scales belong to the likelihood alone. If a row has outputs of several
dimensions, f is flat (C counts them all); only `check_targets` and `predict` see the shape that the model returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from estimators.errors import DataError, UnsupportedError
from estimators.likelihoods.prediction import Prediction

__all__ = ["Likelihood", "Uniform", "check_same_shape"]

Uniform = Callable[[int], Tensor]
"""n -> n independent uniform numbers in (0, 1) per row, (B, n)."""

_ENTRIES = 2**22
"""Entries of Λ that are formed at a time: 32 MiB in float64."""


class Likelihood(ABC):
    """A likelihood with canonical link: Λ does not depend on y, and with E[y | f] as target the residual vanishes."""

    kind: ClassVar[str]

    def __repr__(self) -> str:
        """Return the class with its attributes: the same text for the same values, also in another process."""
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({listed})"

    def given(self, y: Tensor) -> Likelihood:  # noqa: ARG002
        """Return the likelihood of the rows with targets y, which leaves out outputs without a target.

        Args:
            y: targets (B, ...).

        Returns:
            The likelihood itself if every output has a target, as here.
        """
        return self

    @abstractmethod
    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log-likelihood −log p(y | f).

        Args:
            f: network outputs (B, C).
            y: targets (B, ...).

        Returns:
            Nats per row, (B,).
        """

    @abstractmethod
    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        """Return E[−log p(y | f)] over y ~ p(· | f_ref), up to a constant in f: the loss of self-distillation.

        Args:
            f: network outputs (B, C).
            f_ref: outputs (B, C) whose predictive distribution the targets follow.

        Returns:
            Nats per row, (B,).
        """

    @abstractmethod
    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return S v: for v ~ N(0, I), noise with covariance Λ.

        Args:
            f: network outputs (B, C).
            v: vectors (..., B, C).

        Returns:
            S v, (..., B, C).
        """

    @abstractmethod
    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return Λ v.

        Args:
            f: network outputs (B, C).
            v: vectors (..., B, C).

        Returns:
            Λ v, (..., B, C).
        """

    @abstractmethod
    def check_targets(self, f: Tensor, y: Tensor) -> None:
        """Check that y can be the targets of outputs f.

        Args:
            f: network outputs (B, ...), in the shape that the model returned.
            y: targets (B, ...).

        Raises:
            DataError: another shape, dtype or range.
        """

    @abstractmethod
    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        """Return the predictive distribution.

        Args:
            mean: mean of the network outputs, (M, C).
            variance: epistemic variance of the network outputs, (M, C).
            samples: function samples (S, M, C) for a Monte-Carlo average of the link; None for the closed form.

        Returns:
            The prediction.
        """

    def nll_gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of −log p(y | f) in f, by automatic differentiation of `nll`.

        Args:
            f: network outputs (B, C).
            y: targets (B, ...).

        Returns:
            The gradient, (B, C).
        """
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            return torch.autograd.grad(self.nll(leaf, y).sum(), leaf)[0]

    def sample_labels(self, f: Tensor, uniform: Uniform) -> Tensor:  # noqa: ARG002
        """Sample labels y ~ p(y | f), by the inverse of the distribution function.

        Args:
            f: network outputs (B, C).
            uniform: a function that returns n uniform numbers per row, (B, n), in the dtype of f.

        Returns:
            Labels (B, ...), as `nll_gradient` takes them.

        Raises:
            UnsupportedError: the likelihood does not implement it.
        """
        raise UnsupportedError(
            'a likelihood with sample_labels for fisher="mc"',
            received=type(self).__name__,
            remedy='implement sample_labels(f, uniform), or use fisher="exact".',
        )

    def to_target_units(self, prediction: Prediction) -> Prediction:
        """Return a prediction in the original units of the targets.

        Args:
            prediction: a prediction in the units of the network's outputs.

        Returns:
            The prediction itself, unless the likelihood has other units, as `Gaussian(target_scale=...)`.
        """
        return prediction

    def curvature_ratio(self, other: Likelihood) -> float | None:
        """Return the number s with Λ = s Λ_other at any f.

        Args:
            other: another likelihood.

        Returns:
            s, or None if there is no such number.
        """
        return 1.0 if self is other else None

    def hessian(self, f: Tensor) -> Tensor:
        """Return the Hessian Λ of −log p in f.

        Args:
            f: network outputs (B, C).

        Returns:
            Λ, (B, C, C).
        """
        return self.hessian_product(f, _identity_like(f)).permute(1, 2, 0)

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        """Return the diagonal of Λ without forming Λ: for a diagonal Λ it is Λ1.

        Args:
            f: network outputs (B, C).

        Returns:
            The diagonal, (B, C).
        """
        return self.hessian_product(f, torch.ones_like(f))

    def hessian_sum(self, f: Tensor) -> Tensor:
        """Return Σₙ Λₙ, computed for a few rows at a time: with 1000 classes one Λ is a million numbers.

        Args:
            f: network outputs (B, C).

        Returns:
            The sum over rows, (C, C).
        """
        total = f.new_zeros(f.shape[-1], f.shape[-1])
        for part in f.split(max(1, _ENTRIES // f.shape[-1] ** 2)):
            total += self.hessian(part).sum(0)
        return total

    def hessian_sqrt(self, f: Tensor) -> Tensor:
        """Return the root S of Λ, S Sᵀ = Λ.

        Args:
            f: network outputs (B, C).

        Returns:
            S, (B, C, C).
        """
        return self.root_product(f, _identity_like(f)).permute(1, 2, 0)


def check_same_shape(f: Tensor, y: Tensor) -> None:
    """Raise DataError if the targets have another shape than the outputs."""
    if y.shape != f.shape:
        raise DataError(
            f"targets of the shape of the outputs, {tuple(f.shape)}",
            received=f"{tuple(y.shape)}",
            remedy="reshape one of them, for instance y.unsqueeze(-1); nothing is broadcast silently.",
        )


def _identity_like(f: Tensor) -> Tensor:
    """Return the C unit vectors, each for every row: (C, B, C)."""
    n_outputs = f.shape[-1]
    eye = torch.eye(n_outputs, dtype=f.dtype, device=f.device)
    return eye[:, None, :].expand(n_outputs, f.shape[0], n_outputs)
