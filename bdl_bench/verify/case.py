"""A trained network with its likelihood, prior precision, data and queries, in float64."""

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
    """What a verification measures on.

    Args:
        model: at θ̂, in eval mode and in float64.
        likelihood: of the targets.
        prior_precision: δ, a number or a mapping {glob of parameter names: number}.
        batches: training rows as (x, y); their sizes may differ.
        queries: inputs of M rows.
    """

    model: nn.Module
    likelihood: Likelihood
    prior_precision: float | Mapping[str, float]
    batches: list[tuple[Any, Tensor]]
    queries: Any

    def reference(self, names: Sequence[str]) -> DenseReference:
        """Return the dense reference over these parameters."""
        sigma = getattr(self.likelihood, "sigma_noise", 1.0)
        return DenseReference(
            self.model, self.batches, names, self.likelihood.kind, sigma=sigma, delta=self.prior_precision
        )

    def relative_gradient(self) -> float:
        """Return ‖∇L(θ̂)‖ / ‖δ θ̂‖ over all trainable parameters: 0 at a stationary point, about 1 far from one."""
        reference = self.reference(names_of(self.model))
        prior = (reference.delta_vector() * reference.theta).norm()
        return float(reference.gradient().norm() / prior.clamp_min(torch.finfo(prior.dtype).tiny))

    @property
    def n_rows(self) -> int:
        """The number of training rows N."""
        return sum(len(y) for _, y in self.batches)


def names_of(model: nn.Module) -> list[str]:
    """Return the names of all parameters that require a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad]
