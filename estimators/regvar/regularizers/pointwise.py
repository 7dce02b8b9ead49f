"""Pointwise: one refit for each output of each query. Exact."""

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
from estimators.regvar.regularizers.base import Posed, Regularizer
from estimators.regvar.variance_estimate import VarianceEstimate
from estimators.runtime.memory import rows_per_chunk

__all__ = ["Pointwise"]

_COPIES = 64  # of one parameter vector that a solve may keep: the Krylov basis, and a refit's stages


class Pointwise(Regularizer):
    """r(θ) = f_c(x; θ): the response of f(x) is column c of J A⁻¹ Jᵀ (McInerney & Kallus 2025, Theorem 4.1).

    Args:
        of: a functional g of one row's outputs, or of these and its inputs, for instance a margin; then
            r(θ) = g_d(f(x; θ)), and the variance is that of g, (M, D), D counting what g returns.
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

    def pose(self, objective: Objective, x: PyTree = None) -> Posed:
        network = objective.network if self.of is None else ComposedNetwork(objective.network, self.of)
        slopes = network.jacobian(x)  # ∂g/∂θ (M, D, P)
        m, d, p = slopes.shape
        rows = torch.arange(m, device=slopes.device).repeat_interleave(d)
        picks = torch.eye(d, dtype=slopes.dtype, device=slopes.device).repeat(m, 1)
        items = (select_rows(x, rows), picks)
        perturbation = _OutputValue(slopes.reshape(m * d, p), items, network=network)
        return perturbation, lambda solution: _Columns(slopes, solution.displacement.reshape(m, d, p))

    def reading(self, of: Functional) -> Pointwise:
        if self.of is None:
            return Pointwise(of)
        raise OptionError(
            "one functional", received=f"variance(of=...) and {self!r}", remedy="RegVar with Pointwise(), or no of=."
        )

    def rows_at_once(self, objective: Objective, n_outputs: int) -> int | None:
        size = objective.theta.numel() * objective.theta.element_size()
        return rows_per_chunk(_COPIES * n_outputs * size, budget=2**31)


@dataclass(frozen=True)
class _OutputValue(Perturbation):
    """r_k(θ) = g_d(f(x_m; θ)), items (x_m, one-hot of d); no training row has a part of its own in it."""

    network: Network | None = None

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        row, pick = item
        assert self.network is not None
        return share * torch.dot(pick, self.network(theta, row_as_batch(row))[0])


class _Columns(VarianceEstimate):
    """Column d of the covariance at row m is J(x_m) u_md; both (M, D, P)."""

    def __init__(self, slopes: Tensor, displacement: Tensor) -> None:
        self.slopes, self.displacement = slopes, displacement

    def variance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        return (self.slopes * self.displacement).sum(-1)

    def state(self) -> Learned:
        return {}, {}  # of one query set, solved at query

    def covariance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        columns = self.slopes @ self.displacement.transpose(1, 2)
        return 0.5 * (columns + columns.transpose(1, 2))
