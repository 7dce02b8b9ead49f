"""Parameter probes: random directions in weight space, an unbiased estimate for any curvature."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_seed
from estimators.persistence.state import Learned
from estimators.regvar.perturbation import LinearPerturbation
from estimators.regvar.regularizers.base import Posed, Regularizer, checked_count, probe_generator
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["ParameterProbes", "Products"]


class ParameterProbes(Regularizer):
    """r_k(θ) = u_kᵀθ, u ~ N(0, I); variance = mean_k response_k(x) · J(x) u_k, since E[A⁻¹u uᵀ] = A⁻¹.

    Unbiased for the exact Hessian too; it can be negative.
    """

    signed = True

    def __init__(self, n_probes: int = 16, seed: int = 0) -> None:
        self.n_probes, self.seed = checked_count("n_probes", n_probes), checked_seed(seed)

    def __repr__(self) -> str:
        return f"ParameterProbes(n_probes={self.n_probes}, seed={self.seed})"

    def pose(self, objective: Objective, x: PyTree = None) -> Posed:  # noqa: ARG002
        theta, network = objective.theta, objective.network
        generator = probe_generator(objective, self.seed)
        u = torch.randn(self.n_probes, theta.numel(), generator=generator, dtype=theta.dtype, device=theta.device)
        perturbation = LinearPerturbation.along(u, theta)
        return perturbation, lambda solution: _ParameterProducts(network, solution.displacement, u)

    def restored(self, network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]) -> VarianceEstimate:  # noqa: ARG002
        return _ParameterProducts(network, tensors["displacement"], tensors["probes"])


class Products(VarianceEstimate):
    """The mean of K products (K, M, C) at the queries, and its standard error."""

    @abstractmethod
    def products(self, x: PyTree) -> Tensor:
        """(K, M, C)."""

    def variance(self, x: PyTree) -> Tensor:
        return self.products(x).mean(0)

    def standard_error(self, x: PyTree) -> Tensor:
        products = self.products(x)
        if len(products) < 2:
            raise UnsupportedError("at least two probes for a standard error", received="one", remedy="raise n_probes.")
        return products.std(0) / math.sqrt(len(products))


class _ParameterProducts(Products):
    def __init__(self, network: Network, displacement: Tensor, probes: Tensor) -> None:
        self.network, self.displacement, self.probes = network, displacement, probes

    def products(self, x: PyTree) -> Tensor:
        return self.network.jvp(x, self.displacement) * self.network.jvp(x, self.probes)

    def state(self) -> Learned:
        return {"displacement": self.displacement, "probes": self.probes}, {}
