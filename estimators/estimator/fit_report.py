"""What a fit says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from estimators.models.self_check import DerivativeReport
from estimators.objective.objective import Objective

__all__ = ["FitReport", "PassReport"]


@dataclass(frozen=True)
class FitReport:
    """What `fit` checked and chose.

    Attributes:
        derivatives: the comparisons with plain autograd on the user's own module, and the routes in use.
    """

    derivatives: DerivativeReport | None = None


@dataclass(frozen=True, kw_only=True)
class PassReport(FitReport):
    """Passes of forward and backward over the training rows that `fit` spent, by what they were for.

    Every row is counted, from the first check of the data on, and the training of networks of one's own; that of the
    network that was passed to the constructor is not (`estimators.runtime.pass_counter` has the prices).
    """

    passes: dict[str, float]

    @property
    def total_passes(self) -> float:
        """All of `passes`."""
        return sum(self.passes.values())

    @classmethod
    def of(cls, objective: Objective) -> PassReport:
        """What the ledger of its network has."""
        return cls(passes=objective.network.pass_counter.passes(objective.batches.n_data, 1))
