"""What is diagnosed: the objective at its weights, and the rows to judge it by."""

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

    model: the user's own. objective: over a copy of it in eval mode. splits: the rows of validation and test, where
    they were given. weight_decay: what the network was trained with: a number, an optimizer, or None.
    """

    model: nn.Module
    objective: Objective
    splits: dict[str, TrainingData] = field(default_factory=dict)
    weight_decay: float | torch.optim.Optimizer | None = None
    costs: list[Cost] = field(default_factory=list)

    @property
    def likelihood(self) -> Likelihood:
        """Of the data term."""
        return self.objective.likelihood

    @property
    def n_data(self) -> int:
        """N."""
        return self.objective.batches.n_data

    @cached_property
    def gradient(self) -> Tensor:
        """∇L(θ̂), (P,)."""
        return self.objective.gradient(self.objective.theta)

    @cached_property
    def n_outputs(self) -> int:
        """C, all outputs of a row."""
        return int(self.objective.network.outputs(next(iter(self.objective.batches)).x).shape[-1])


Check = Callable[[DiagnosticContext], Iterable[Finding]]
