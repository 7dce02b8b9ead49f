"""Signed probes: random signs over the query set, an unbiased estimate of the diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_seed
from estimators.persistence.state import Learned
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.regularizers.base import Posed, Regularizer, checked_count, probe_generator
from estimators.regvar.regularizers.parameter_probes import Products

__all__ = ["SignedProbes"]


class SignedProbes(Regularizer):
    """r_k(θ) = Σⱼ s_kj f(xⱼ; θ), s = ±1 over rows and outputs of the query set; variance = mean_k s_k · response_k.

    The estimator of a diagonal of Hutchinson (1990) and Bekas et al. (2007): unbiased, it can be negative, and its
    noise grows with the covariances between queries. It speaks of the set of x passed to `variance`.
    """

    at_query = True
    batch_dependent = True

    signed = True

    def __init__(self, n_probes: int = 16, seed: int = 0) -> None:
        self.n_probes, self.seed = checked_count("n_probes", n_probes), checked_seed(seed)

    def __repr__(self) -> str:
        return f"SignedProbes(n_probes={self.n_probes}, seed={self.seed})"

    def pose(self, objective: Objective, x: PyTree = None) -> Posed:
        network = objective.network
        signs = self.signs(objective, network.outputs(x))
        direction = network.vjp(x, signs)  # Jᵀ s, summed over the query set
        perturbation = _SignedSum(direction, signs, network=network, queries=x)
        return perturbation, lambda solution: _SignedProducts(signs * network.jvp(x, solution.displacement))

    def signs(self, objective: Objective, f: Tensor) -> Tensor:
        """±1, (K, M, C), for outputs f (M, C)."""
        generator = probe_generator(objective, self.seed)
        shape = (self.n_probes, *f.shape)
        return torch.randint(0, 2, shape, generator=generator, device=f.device).to(f.dtype) * 2 - 1


@dataclass(frozen=True)
class _SignedSum(Perturbation):
    """r_k(θ) = Σ s_k ∘ f(queries; θ), items s (K, M, C)."""

    network: Network | None = None
    queries: PyTree = None

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        assert self.network is not None
        total: Tensor = (item * self.network(theta, self.queries)).sum()
        return share * total


class _SignedProducts(Products):
    def __init__(self, signed: Tensor) -> None:
        self.signed = signed

    def products(self, x: PyTree) -> Tensor:  # noqa: ARG002
        return self.signed

    def state(self) -> Learned:
        return {}, {}  # of one query set, solved at query
