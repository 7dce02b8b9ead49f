"""What a proof is about: a trained network with its likelihood, δ, data and queries, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdl_bench.verify.reference import DenseReference
from estimators.likelihoods import Likelihood

__all__ = ["VerificationCase", "names_of"]


@dataclass(frozen=True)
class VerificationCase:
    """A network at θ̂ in eval mode; batches of (x, y), ragged where they come so; queries, a batch of x."""

    model: nn.Module
    likelihood: Likelihood
    prior_precision: float | Mapping[str, float]
    batches: list[tuple[Any, Tensor]]
    queries: Any

    def reference(self, names: Sequence[str]) -> DenseReference:
        """The dense reference over these parameters."""
        sigma = getattr(self.likelihood, "sigma_noise", 1.0)
        return DenseReference(
            self.model, self.batches, names, self.likelihood.kind, sigma=sigma, delta=self.prior_precision
        )

    def relative_gradient(self) -> float:
        """‖∇L(θ̂)‖ / ‖δ θ̂‖ over all parameters that require a gradient: 0 where θ̂ is stationary, about 1 far from it."""
        reference = self.reference(names_of(self.model))
        prior = (reference.delta_vector() * reference.theta).norm()
        return float(reference.gradient().norm() / prior.clamp_min(torch.finfo(prior.dtype).tiny))

    @property
    def n_rows(self) -> int:
        """N."""
        return sum(len(y) for _, y in self.batches)


def names_of(model: nn.Module) -> list[str]:
    """Every parameter that requires a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad]
