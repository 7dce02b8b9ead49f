"""Pointwise: one solve per output of each query row, exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.errors import OptionError
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, row_as_batch, select_rows
from estimators.objective.objective import Objective
from estimators.option_checks import shown
from estimators.persistence.state import Learned
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.regularizers.base import RegularizedProblem, Regularizer
from estimators.regvar.variance_estimate import VarianceEstimate
from estimators.runtime.memory import rows_per_chunk

__all__ = ["Pointwise"]

_VECTORS_PER_SOLVE = 64  # parameter vectors that a solve may keep: the Krylov basis, or the stages of a refit
_SOLVE_BYTES = 2**31  # memory for the vectors of one solve


class Pointwise(Regularizer):
    """The output itself, r(θ) = f_c(x; θ): the response of f(x) is column c of the covariance J A⁻¹ Jᵀ.

    Exact for any positive definite A, at the price of one solve per row and output of the queries; `variance` solves.

    Source: McInerney & Kallus, AISTATS 2025, Theorem 4.1.

    Args:
        of: g, a function of the outputs of one row, (C,), or of these and the row's inputs; it returns a tensor (D,),
            for instance a margin. Then r(θ) = g_d(f(x; θ)) and `variance` returns the variance of g, (M, D).

    Raises:
        OptionError: if `of` is not callable.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import LinearResponse, Pointwise, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> regvar = RegVar(torch.nn.Linear(1, 1), "regression",
        ...                 regularizer=Pointwise(), solver=LinearResponse()).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
    """

    at_query = True

    def __init__(self, of: Functional | None = None) -> None:
        if of is not None and not callable(of):
            raise OptionError(
                "of, a function of one row's outputs, or None", received=shown(of), remedy="of=lambda f: f[0] - f[1]."
            )
        self.of = of

    def __repr__(self) -> str:
        return "Pointwise()" if self.of is None else f"Pointwise(of={getattr(self.of, '__name__', self.of)!r})"

    def build_problem(self, objective: Objective, x: PyTree = None) -> RegularizedProblem:
        network = objective.network if self.of is None else ComposedNetwork(objective.network, self.of)
        gradients = network.jacobian(x)  # ∂g/∂θ (M, D, P)
        m, d, p = gradients.shape
        rows = torch.arange(m, device=gradients.device).repeat_interleave(d)
        picks = torch.eye(d, dtype=gradients.dtype, device=gradients.device).repeat(m, 1)
        items = (select_rows(x, rows), picks)
        perturbation = _OutputValue(gradients.reshape(m * d, p), items, network=network)
        return perturbation, lambda solution: _Columns(gradients, solution.displacement.reshape(m, d, p))

    def for_functional(self, of: Functional) -> Pointwise:
        if self.of is None:
            return Pointwise(of)
        raise OptionError(
            "one functional", received=f"variance(of=...) and {self!r}", remedy="RegVar with Pointwise(), or no of=."
        )

    def rows_per_solve(self, objective: Objective, n_outputs: int) -> int | None:
        size = objective.theta.numel() * objective.theta.element_size()
        return rows_per_chunk(_VECTORS_PER_SOLVE * n_outputs * size, budget=_SOLVE_BYTES)


@dataclass(frozen=True)
class _OutputValue(Perturbation):
    """r_k(θ) = g_d(f(x_m; θ)); `items` are (x_m, the one-hot vector of d). It has no sum over training rows."""

    network: Network | None = None

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        row, pick = item
        assert self.network is not None
        return share * torch.dot(pick, self.network(theta, row_as_batch(row))[0])


class _Columns(VarianceEstimate):
    """Exact covariances: column d at row m is J(x_m) u_md, for gradients J and displacements u, (M, D, P)."""

    def __init__(self, gradients: Tensor, displacement: Tensor) -> None:
        self.gradients, self.displacement = gradients, displacement

    def variance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        return (self.gradients * self.displacement).sum(-1)

    def state(self) -> Learned:
        return {}, {}  # solved at query: a fit has nothing to save

    def covariance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        columns = self.gradients @ self.displacement.transpose(1, 2)
        return 0.5 * (columns + columns.transpose(1, 2))
