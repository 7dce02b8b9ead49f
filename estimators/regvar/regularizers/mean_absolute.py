"""MeanAbsolute: the amortised form of the paper, one refit for all queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.regularizers.base import RegularizedProblem, Regularizer
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["MeanAbsolute"]


class MeanAbsolute(Regularizer):
    """The amortised form of RegVar: r(θ) = (1/NC) Σₙ Σ_c |f_c(xₙ; θ)|, estimated by the absolute response of f.

    N training rows, C outputs. One solve serves all queries. The result is NOT the variance: the response of f_c(x) is
    (1/NC) Σₙ,c′ sign f_c′(xₙ) Σ(x, xₙ)_cc′, a sign-weighted mean of covariances with the training rows.

    Source: McInerney & Kallus, AISTATS 2025, the amortised form; kept as published, for comparison.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import MeanAbsolute, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> regvar = RegVar(torch.nn.Linear(1, 1), "regression", regularizer=MeanAbsolute()).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
    """

    def __repr__(self) -> str:
        return "MeanAbsolute()"

    def build_problem(self, objective: Objective, x: PyTree = None) -> RegularizedProblem:  # noqa: ARG002
        network = objective.network
        gradient = torch.zeros_like(objective.theta)[None]
        with network.pass_counter.phase("gradient of r"):
            for batch in objective.batches:
                f, slope = network.outputs_and_vjp(batch.x, lambda f: f.sign()[None])
                gradient += slope / (objective.batches.n_data * f.shape[-1])
        items = gradient.new_zeros(1)
        perturbation = _MeanAbsoluteOutputs(gradient, items, network=network, n_data=objective.batches.n_data)
        return perturbation, lambda solution: _AbsoluteResponse(network, solution.displacement)

    def restore_estimate(
        self,
        network: Network,
        tensors: dict[str, Tensor],
        learned: dict[str, Any],  # noqa: ARG002
    ) -> VarianceEstimate:
        return _AbsoluteResponse(network, tensors["displacement"])


@dataclass(frozen=True)
class _MeanAbsoluteOutputs(Perturbation):
    """r(θ) = (1/NC) Σ |f|; `value` is the sum over the rows of the batch."""

    network: Network | None = None
    n_data: int = 1

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        assert self.network is not None
        f = self.network(theta, x)
        return f.abs().sum() / (self.n_data * f.shape[-1])


class _AbsoluteResponse(VarianceEstimate):
    """|J(x) u| for one displacement u, (1, P)."""

    def __init__(self, network: Network, displacement: Tensor) -> None:
        self.network, self.displacement = network, displacement

    def variance(self, x: PyTree) -> Tensor:
        return self.network.jvp(x, self.displacement)[0].abs()

    def state(self) -> Learned:
        return {"displacement": self.displacement}, {}
