"""The report of a fit: the derivative checks, and the passes over the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from estimators.models.self_check import DerivativeReport

__all__ = ["FitReport"]


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """The report of a fit, in `fit_report_`.

    Counting of passes starts with the first check of the data and includes networks that the fit trains. The training
    of the network that was passed to the constructor is not included. The costs are defined in
    `estimators.runtime.pass_counter`.

    Attributes:
        derivatives: the comparisons with plain autograd on the user's own module, and the derivative routes in use.
        passes: forward and backward passes over the training rows, by the phase of the fit.
    """

    derivatives: DerivativeReport | None = None
    passes: dict[str, float] = field(default_factory=dict)

    @property
    def total_passes(self) -> float:
        """The sum of `passes`."""
        return sum(self.passes.values())
