"""Mean absolute: the paper's amortised form, one refit for all queries."""

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
from estimators.regvar.regularizers.base import Posed, Regularizer
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["MeanAbsolute"]


class MeanAbsolute(Regularizer):
    """r(θ) = (1/NC) Σₙ Σ_c |f_c(xₙ; θ)|, read as |response| (McInerney & Kallus 2025, the amortised form).

    NOT the variance: the response of f_c(x) is (1/NC) Σₙ,c′ sign f_c′(xₙ) Σ(x, xₙ)_cc′, a sign-weighted mean covariance
    with the training rows. Kept faithful to the paper, and labelled.
    """

    def __repr__(self) -> str:
        return "MeanAbsolute()"

    def pose(self, objective: Objective, x: PyTree = None) -> Posed:  # noqa: ARG002
        network = objective.network
        direction = torch.zeros_like(objective.theta)[None]
        with network.pass_counter.phase("direction"):
            for batch in objective.batches:
                f, slope = network.outputs_and_vjp(batch.x, lambda f: f.sign()[None])
                direction += slope / (objective.batches.n_data * f.shape[-1])
        items = direction.new_zeros(1)
        perturbation = _MeanAbsoluteOutputs(direction, items, network=network, n_data=objective.batches.n_data)
        return perturbation, lambda solution: _AbsoluteResponse(network, solution.displacement)

    def restored(self, network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]) -> VarianceEstimate:  # noqa: ARG002
        return _AbsoluteResponse(network, tensors["displacement"])


@dataclass(frozen=True)
class _MeanAbsoluteOutputs(Perturbation):
    """A batch's rows of (1/NC) Σ |f|."""

    network: Network | None = None
    n_data: int = 1

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        assert self.network is not None
        f = self.network(theta, x)
        return f.abs().sum() / (self.n_data * f.shape[-1])


class _AbsoluteResponse(VarianceEstimate):
    def __init__(self, network: Network, displacement: Tensor) -> None:
        self.network, self.displacement = network, displacement

    def variance(self, x: PyTree) -> Tensor:
        return self.network.jvp(x, self.displacement)[0].abs()

    def state(self) -> Learned:
        return {"displacement": self.displacement}, {}
