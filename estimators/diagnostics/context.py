"""The input of diagnostic checks: the objective at its weights, and held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from estimators.data.training_data import TrainingData
from estimators.diagnostics.findings import Cost, Finding
from estimators.likelihoods import Likelihood
from estimators.objective.objective import Objective

__all__ = ["Check", "DiagnosticContext"]


@dataclass(frozen=True)
class DiagnosticContext:
    """A trained network with its objective.

    Attributes:
        model: the user's module.
        objective: L over a copy of the model in eval mode.
        splits: the validation and test rows that were passed.
        weight_decay: the weight decay of the training: a number, the optimizer, or None.
        costs: the costs that a check has estimated.
    """

    model: nn.Module
    objective: Objective
    splits: dict[str, TrainingData] = field(default_factory=dict)
    weight_decay: float | torch.optim.Optimizer | None = None
    costs: list[Cost] = field(default_factory=list)

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the data term."""
        return self.objective.likelihood

    @property
    def n_data(self) -> int:
        """The number N of training rows."""
        return self.objective.batches.n_data

    @cached_property
    def gradient(self) -> Tensor:
        """∇L(θ̂), (P,)."""
        return self.objective.gradient(self.objective.theta)

    @cached_property
    def n_outputs(self) -> int:
        """The number C of outputs of a row."""
        return int(self.objective.network.outputs(next(iter(self.objective.batches)).x).shape[-1])


Check = Callable[[DiagnosticContext], Iterable[Finding]]
