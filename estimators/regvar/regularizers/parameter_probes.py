"""ParameterProbes: random directions in parameter space, an unbiased estimate for any curvature."""

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
from estimators.option_checks import checked_integer, checked_seed
from estimators.persistence.state import Learned
from estimators.regvar.perturbation import LinearPerturbation
from estimators.regvar.regularizers.base import RegularizedProblem, Regularizer, probe_generator
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["ParameterProbes", "Products"]


class ParameterProbes(Regularizer):
    """Random linear functions r_k(θ) = u_kᵀθ with u_k ~ N(0, I); one solve per probe serves all queries.

    The variance at x is the mean over k of response_k(x) · J(x) u_k. It is unbiased, since E[A⁻¹u uᵀ] = A⁻¹, also for
    curvature "hessian". An estimate can be negative.

    Args:
        n_probes: K, the number of probes.
        seed: seed of the probes.

    Raises:
        OptionError: if `n_probes` is not an integer >= 1, or `seed` is not an integer.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import LinearResponse, ParameterProbes, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> regvar = RegVar(torch.nn.Linear(1, 1), "regression",
        ...                 regularizer=ParameterProbes(64), solver=LinearResponse()).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
    """

    signed = True

    def __init__(self, n_probes: int = 16, seed: int = 0) -> None:
        self.n_probes, self.seed = checked_integer("n_probes", n_probes, at_least=1), checked_seed(seed)

    def __repr__(self) -> str:
        return f"ParameterProbes(n_probes={self.n_probes}, seed={self.seed})"

    def build_problem(self, objective: Objective, x: PyTree = None) -> RegularizedProblem:  # noqa: ARG002
        theta, network = objective.theta, objective.network
        generator = probe_generator(objective, self.seed)
        u = torch.randn(self.n_probes, theta.numel(), generator=generator, dtype=theta.dtype, device=theta.device)
        perturbation = LinearPerturbation.along(u, theta)
        return perturbation, lambda solution: _ParameterProducts(network, solution.displacement, u)

    def restore_estimate(
        self,
        network: Network,
        tensors: dict[str, Tensor],
        learned: dict[str, Any],  # noqa: ARG002
    ) -> VarianceEstimate:
        return _ParameterProducts(network, tensors["displacement"], tensors["probes"])


class Products(VarianceEstimate):
    """Variance estimates that are the mean of K products, one per probe."""

    @abstractmethod
    def products(self, x: PyTree) -> Tensor:
        """Return the product of each probe at x, (K, M, C)."""

    def variance(self, x: PyTree) -> Tensor:
        return self.products(x).mean(0)

    def standard_error(self, x: PyTree) -> Tensor:
        products = self.products(x)
        if len(products) < 2:
            raise UnsupportedError("at least two probes for a standard error", received="one", remedy="raise n_probes.")
        return products.std(0) / math.sqrt(len(products))


class _ParameterProducts(Products):
    """J(x) A⁻¹u · J(x) u for each probe u; displacements A⁻¹u and probes u are (K, P)."""

    def __init__(self, network: Network, displacement: Tensor, probes: Tensor) -> None:
        self.network, self.displacement, self.probes = network, displacement, probes

    def products(self, x: PyTree) -> Tensor:
        return self.network.jvp(x, self.displacement) * self.network.jvp(x, self.probes)

    def state(self) -> Learned:
        return {"displacement": self.displacement, "probes": self.probes}, {}
