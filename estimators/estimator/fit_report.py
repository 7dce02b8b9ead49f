"""Reports of a fit: the derivative checks, and the passes over the data."""

from __future__ import annotations

from dataclasses import dataclass

from estimators.models.self_check import DerivativeReport
from estimators.objective.objective import Objective

__all__ = ["FitReport", "PassReport"]


@dataclass(frozen=True)
class FitReport:
    """The report of a fit, in `fit_report_`.

    Attributes:
        derivatives: the comparisons with plain autograd on the user's own module, and the derivative routes in use.
    """

    derivatives: DerivativeReport | None = None


@dataclass(frozen=True, kw_only=True)
class PassReport(FitReport):
    """The report of a fit with its cost in forward and backward passes over the training rows.

    Counting starts with the first check of the data and includes networks that the fit trains. The training of the
    network that was passed to the constructor is not included. `estimators.runtime.pass_counter` defines the costs.

    Attributes:
        passes: the passes of each phase of the fit.
    """

    passes: dict[str, float]

    @property
    def total_passes(self) -> float:
        """The sum of `passes`."""
        return sum(self.passes.values())

    @classmethod
    def of(cls, objective: Objective) -> PassReport:
        """Return the passes that the network of an objective has counted.

        Args:
            objective: the objective of the fit.

        Returns:
            The report, without `derivatives`.
        """
        return cls(passes=objective.network.pass_counter.passes(objective.batches.n_data, 1))
