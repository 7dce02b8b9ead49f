"""The Laplace approximation of the marginal likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.numerics.dtype import to_algebra_dtype
from estimators.objective.objective import Objective

__all__ = ["log_marginal_likelihood"]


def log_marginal_likelihood(objective: Objective, prior_precision: Tensor, log_det: Tensor) -> Tensor:
    """Return log p(D|θ̂) − ½ Σ δ(θ̂−θ₀)² + ½ Σ log δ − ½ log|A|, a scalar in nats.

    The 2π of the prior and of the Gaussian integral cancel. Raises UnsupportedError for an improper prior (a δ of 0),
    which has no evidence.
    """
    if not bool((prior_precision > 0).all()):
        raise UnsupportedError(
            "a proper prior for a marginal likelihood",
            received="prior_precision 0 for some parameters",
            remedy="give every parameter a positive prior_precision.",
        )
    delta, theta, mean = map(to_algebra_dtype, (prior_precision, objective.theta, objective.prior.mean))
    scatter = (delta * (theta - mean).square()).sum()
    network, likelihood = objective.network, objective.likelihood
    losses = [likelihood.nll(to_algebra_dtype(network.outputs(b.x)), b.y).sum() for b in objective.batches]
    return -torch.stack(losses).sum() - 0.5 * (scatter - delta.log().sum() + log_det)
