"""SignedProbes: random signs over the query set, an unbiased estimate of the variances of all rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_integer, checked_seed
from estimators.persistence.state import Learned
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.regularizers.base import RegularizedProblem, Regularizer, probe_generator
from estimators.regvar.regularizers.parameter_probes import Products

__all__ = ["SignedProbes"]


class SignedProbes(Regularizer):
    """Signed sums over the query set, r_k(θ) = Σⱼ s_kj f(xⱼ; θ), with random signs s = ±1 per row and output.

    The variance is the mean over k of s_k · response_k. It is unbiased, but can be negative, and its noise grows with
    the covariances between queries. `variance` solves for K functions per query set, so that the result at a row
    depends on the other rows passed with it.

    Source: the estimator of a diagonal of Hutchinson (1990) and Bekas, Kokiopoulou & Saad (2007).

    Args:
        n_probes: K, the number of sign vectors.
        seed: seed of the signs.

    Raises:
        OptionError: if `n_probes` is not an integer >= 1, or `seed` is not an integer.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import LinearResponse, RegVar, SignedProbes
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> regvar = RegVar(torch.nn.Linear(1, 1), "regression",
        ...                 regularizer=SignedProbes(64), solver=LinearResponse()).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
    """

    at_query = True
    batch_dependent = True
    signed = True

    def __init__(self, n_probes: int = 16, seed: int = 0) -> None:
        self.n_probes, self.seed = checked_integer("n_probes", n_probes, at_least=1), checked_seed(seed)

    def __repr__(self) -> str:
        return f"SignedProbes(n_probes={self.n_probes}, seed={self.seed})"

    def build_problem(self, objective: Objective, x: PyTree = None) -> RegularizedProblem:
        network = objective.network
        signs = self.signs(objective, network.outputs(x))
        gradient = network.vjp(x, signs)  # Jᵀ s, summed over the query set
        perturbation = _SignedSum(gradient, signs, network=network, queries=x)
        return perturbation, lambda solution: _SignedProducts(signs * network.jvp(x, solution.displacement))

    def signs(self, objective: Objective, f: Tensor) -> Tensor:
        """Return the random signs for a query set.

        Args:
            objective: the objective, whose device the signs are on.
            f: outputs of the query set, (M, C).

        Returns:
            Signs ±1, (K, M, C), of the dtype of f.
        """
        generator = probe_generator(objective, self.seed)
        shape = (self.n_probes, *f.shape)
        return torch.randint(0, 2, shape, generator=generator, device=f.device).to(f.dtype) * 2 - 1


@dataclass(frozen=True)
class _SignedSum(Perturbation):
    """r_k(θ) = Σ s_k ∘ f(queries; θ); `items` are the signs s, (K, M, C)."""

    network: Network | None = None
    queries: PyTree = None

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        assert self.network is not None
        total: Tensor = (item * self.network(theta, self.queries)).sum()
        return share * total


class _SignedProducts(Products):
    """s_k · response_k at the query set that was solved for, (K, M, C)."""

    def __init__(self, signed: Tensor) -> None:
        self.signed = signed

    def products(self, x: PyTree) -> Tensor:  # noqa: ARG002
        return self.signed

    def state(self) -> Learned:
        return {}, {}  # solved at query: a fit has nothing to save
